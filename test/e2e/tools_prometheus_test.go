package e2e

import (
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// Prometheus, in a pod, finds nodes, the API server, pods, endpoints, Services
// and ingresses by the API, and scrapes them all.
func TestPrometheus(t *testing.T) {
	n := shared(t)
	n.importTool("prometheus", "prometheus:3")
	ns := n.namespace("prometheus")
	t.Cleanup(func() {
		n.Kubectl("delete", "clusterrole/tests-prometheus", "clusterrolebinding/tests-prometheus", "--timeout=20s")
	})
	manifest, err := os.ReadFile(filepath.Join(n.Repo, "test", "tools", "prometheus", "deploy.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	n.ok(n.Apply(strings.ReplaceAll(string(manifest), "NAMESPACE", ns)))
	n.wait(ns, "deployment/shop", "condition=Available")
	n.wait(ns, "deployment/prometheus", "condition=Available")

	// Once by way of the API server, which is how a person looks in.
	n.until("Prometheus through the API", func() (bool, string) {
		r := n.Kubectl("get", "--raw", "/api/v1/namespaces/"+ns+"/services/prometheus:web/proxy/-/healthy")
		return r.Err == nil && strings.Contains(r.Stdout, "Healthy"), r.String()
	})
	api := "http://" + n.field(ns, "service/prometheus", "{.spec.clusterIP}") + ":9090/api/v1/"
	ask := func(path string) (answer string, err error) {
		code, answer := get(n.Client(), api+path)
		if code != http.StatusOK {
			err = fmt.Errorf("%d %s", code, answer)
		}
		return answer, err
	}
	type targets struct {
		Data struct {
			ActiveTargets []struct {
				ScrapePool, ScrapeURL, Health, LastError string
			}
		}
	}
	want := map[string]int{
		"apiserver": 1, "node": 1, "node-cadvisor": 1, "node-resource": 1, "node-by-api": 1,
		"pods": 3, "endpoints": 2, "endpointslices": 2, "services": 1, "ingresses": 1,
	}
	n.until("all targets are up", func() (bool, string) {
		out, err := ask("targets?state=active")
		if err != nil {
			return false, err.Error()
		}
		up, down := map[string]int{}, []string{}
		for _, target := range decode[targets](t, out).Data.ActiveTargets {
			if target.Health == "up" {
				up[target.ScrapePool]++
			} else {
				down = append(down, fmt.Sprintf("%s %s %s: %s", target.ScrapePool, target.ScrapeURL, target.Health, target.LastError))
			}
		}
		return len(down) == 0 && maps.Equal(up, want), fmt.Sprintf("up: %v\n%s", up, strings.Join(down, "\n"))
	})

	type answer struct {
		Data struct {
			Result []struct {
				Metric map[string]string
				Value  [2]any
			}
		}
	}
	// Values, each as one number.
	for _, c := range []struct {
		query string
		least float64
		most  float64
	}{
		{`sum(up)`, 14, 14},
		{`sum(shop_orders_total{job="pods",controller=~"shop-.+",country="north"})`, 84, 84},
		{`count(count by (pod) (shop_orders_total{job="endpoints"}))`, 2, 2},
		{`count(count by (pod) (shop_orders_total{job="endpointslices"}))`, 2, 2},
		{`shop_orders_total{job="services"}`, 42, 42},
		{`shop_orders_total{job="ingresses",host="shop.example"}`, 42, 42},
		{`sum(apiserver_request_total{job="apiserver",resource="pods",verb="POST"})`, 1, 1e6},
		{`kubelet_running_pods{job="node"}`, 3, 1e3},
		{`sum(container_memory_working_set_bytes{job="node-cadvisor",namespace="` + ns + `",container="prometheus"})`, 1 << 20, 1 << 30},
		{`sum(container_memory_working_set_bytes{job="node-by-api",namespace="` + ns + `",container="prometheus"})`, 1 << 20, 1 << 30},
		{`sum(rate(container_cpu_usage_seconds_total{job="node-cadvisor",namespace="` + ns + `",container="prometheus"}[30s]))`, 0.001, 2},
		{`sum(container_network_receive_bytes_total{job="node-cadvisor",namespace="` + ns + `",pod=~"prometheus-.+"})`, 1000, 1e9},
		{`node_memory_working_set_bytes{job="node-resource"}`, 1 << 20, 1 << 40},
		{`count(pod_memory_working_set_bytes{job="node-resource",namespace="` + ns + `"})`, 3, 3},
		{`scrape_samples_scraped{job="node"}`, 10, 200},
	} {
		n.until(c.query, func() (bool, string) {
			out, err := ask("query?query=" + url.QueryEscape(c.query))
			if err != nil {
				return false, err.Error()
			}
			result := decode[answer](t, out).Data.Result
			if len(result) != 1 {
				return false, out
			}
			value, err := strconv.ParseFloat(fmt.Sprint(result[0].Value[1]), 64)
			return err == nil && value >= c.least && value <= c.most, out
		})
	}

	// A pod that goes is a target no more.
	n.kubectl("-n", ns, "scale", "deployment/shop", "--replicas=1")
	n.until("one pod is left", func() (bool, string) {
		out, err := ask("query?query=" + url.QueryEscape(`count(up{job="endpointslices"})`))
		return err == nil && strings.Contains(out, `,"1"]`), out
	})
}
