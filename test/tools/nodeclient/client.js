// What a program built on Kubernetes' Node client does. By hand, with node 22.19 or newer and KUBECONFIG set:
//
//	npm ci && node client.js NAMESPACE
//
// It ends with status 0 after everything was as it should be.
import assert from 'node:assert/strict';
import { once } from 'node:events';
import { PassThrough } from 'node:stream';
import { text } from 'node:stream/consumers';
import * as k8s from '@kubernetes/client-node';

const namespace = process.argv[2];
const config = new k8s.KubeConfig();
config.loadFromDefault();
const core = config.makeApiClient(k8s.CoreV1Api);
const apps = config.makeApiClient(k8s.AppsV1Api);
setTimeout(() => { throw new Error('not done after a minute'); }, 60_000).unref();

const step = (what) => console.log(what);
const refused = (code, reason, call) => assert.rejects(call, (e) => e.code === code && JSON.parse(e.body).reason === reason);

step('create a pod; an informer sees it become ready');
const pods = k8s.makeInformer(config, `/api/v1/namespaces/${namespace}/pods`, () => core.listNamespacedPod({ namespace }));
const isReady = new Promise((resolve, reject) => {
  pods.on('error', reject);
  pods.on('update', (pod) => pod.status.conditions?.some((c) => c.type === 'Ready' && c.status === 'True') && resolve(pod));
});
await pods.start();
const pod = {
  metadata: { name: 'js' },
  spec: {
    terminationGracePeriodSeconds: 0,
    containers: [{
      name: 'main',
      image: 'busybox:1',
      command: ['sh', '-c', 'echo one; echo two; hostname >/tmp/name; exec httpd -f -p 8080 -h /tmp'],
      readinessProbe: { httpGet: { path: '/name', port: 8080 }, periodSeconds: 1 },
    }],
  },
};
await core.createNamespacedPod({ namespace, body: pod });
await isReady;
assert.equal(pods.get('js', namespace).status.phase, 'Running');
await refused(409, 'AlreadyExists', core.createNamespacedPod({ namespace, body: pod }));
await refused(404, 'NotFound', core.readNamespacedPod({ namespace, name: 'no' }));

step('read logs, whole and as they come');
assert.equal(await core.readNamespacedPodLog({ namespace, name: 'js' }), 'one\ntwo\n');
const following = new PassThrough();
await new k8s.Log(config).log(namespace, 'js', 'main', following, { follow: true });
let seen = '';
for await (const chunk of following) {
  seen += chunk;
  if (seen === 'one\ntwo\n') break;
}

step('run a command in it');
const [input, output, errors] = [new PassThrough(), new PassThrough(), new PassThrough()];
const status = await new Promise((resolve, reject) => {
  new k8s.Exec(config).exec(namespace, 'js', 'main', ['sh', '-c', 'read word; echo got $word; echo trouble >&2; exit 3'],
    output, errors, input, false, resolve).then(() => input.write('hello\n'), reject);
});
assert.equal(status.details.causes[0].message, '3');
output.end();
errors.end();
assert.equal(await text(output), 'got hello\n');
assert.equal(await text(errors), 'trouble\n');

step('reach a port of it');
const answer = new PassThrough();
const request = new PassThrough();
const socket = await new k8s.PortForward(config).portForward(namespace, 'js', [8080], answer, null, request);
request.write('GET /name HTTP/1.0\r\n\r\n');
let page = '';
for await (const chunk of answer) {
  page += chunk;
  if (page.endsWith('\r\n\r\njs\n')) break;
}
socket.close();

step('list in pages, and watch from there on');
for (let i = 0; i < 7; i++) {
  await core.createNamespacedConfigMap({ namespace, body: { metadata: { name: `page-${i}`, labels: { from: 'node' } } } });
}
const names = [];
let list;
do {
  list = await core.listNamespacedConfigMap({ namespace, labelSelector: 'from=node', limit: 3, _continue: list?.metadata._continue });
  names.push(...list.items.map((m) => m.metadata.name));
} while (list.metadata._continue);
assert.deepEqual(names, [0, 1, 2, 3, 4, 5, 6].map((i) => `page-${i}`));
const changes = new PassThrough({ objectMode: true });
const watching = await new k8s.Watch(config).watch(`/api/v1/namespaces/${namespace}/configmaps`,
  { labelSelector: 'from=node', resourceVersion: list.metadata.resourceVersion },
  (type, object) => changes.write([type, object.metadata.name, object.data]), () => changes.end());
await core.patchNamespacedConfigMap({ namespace, name: 'page-0', body: { data: { a: '1' } } },
  k8s.setHeaderOptions('Content-Type', k8s.PatchStrategy.MergePatch));
await core.deleteNamespacedConfigMap({ namespace, name: 'page-1' });
assert.deepEqual((await once(changes, 'data'))[0], ['MODIFIED', 'page-0', { a: '1' }]);
assert.deepEqual((await once(changes, 'data'))[0], ['DELETED', 'page-1', undefined]);
watching.abort();

step('apply what a file says, scale it, and see it ready');
const objects = k8s.KubernetesObjectApi.makeApiClient(config);
const deployment = {
  apiVersion: 'apps/v1',
  kind: 'Deployment',
  metadata: { name: 'web', namespace },
  spec: {
    selector: { matchLabels: { app: 'web' } },
    template: {
      metadata: { labels: { app: 'web' } },
      spec: { terminationGracePeriodSeconds: 0, containers: [{ name: 'main', image: 'busybox:1', command: ['sleep', '1000'] }] },
    },
  },
};
await objects.patch(deployment, undefined, undefined, 'nodeclient', true, k8s.PatchStrategy.ServerSideApply);
await apps.patchNamespacedDeploymentScale({ namespace, name: 'web', body: { spec: { replicas: 2 } } },
  k8s.setHeaderOptions('Content-Type', k8s.PatchStrategy.MergePatch));
for (;;) {
  const { status } = await apps.readNamespacedDeployment({ namespace, name: 'web' });
  if (status.readyReplicas === 2) break;
  await new Promise((resolve) => { setTimeout(resolve, 100); });
}

step('what things use');
const [usage] = (await new k8s.Metrics(config).getNodeMetrics()).items;
assert.match(usage.usage.cpu, /^\d/);
await pods.stop();
step('done');
process.exit(0);
