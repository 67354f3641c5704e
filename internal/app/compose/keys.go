package compose

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
)

// standing is what a key means here, seen from Docker Compose.
type standing int

const (
	same    standing = iota // does what it does there
	better                  // does it better; the text says how
	refused                 // the text says why and what to do instead
)

type key struct {
	standing
	text string
}

// keys has every key of the Compose Specification. "*" stands for a name that
// people choose or a position in a list. A key that is a prefix of others is
// judged by those. Keys that begin with x- are people's own everywhere.
var keys = map[string]key{
	"name":    {same, "also the namespace"},
	"version": {same, "says nothing, as there"},
	"include": {same, ""},
	"models":  {refused, "models are not run; make the model's server a service"},

	"services.*.image":              {same, ""},
	"services.*.build":              {refused, "images are not built yet; build it with docker or podman, `tutti image load` it, and name it under image"},
	"services.*.command":            {same, ""},
	"services.*.entrypoint":         {same, "cleared with [], command must be given"},
	"services.*.environment":        {same, ""},
	"services.*.env_file":           {same, ""},
	"services.*.label_file":         {same, ""},
	"services.*.labels":             {same, "annotations of the pod"},
	"services.*.annotations":        {same, "of the pod"},
	"services.*.container_name":     {same, "a name in DNS; the pod has its own"},
	"services.*.hostname":           {same, ""},
	"services.*.domainname":         {refused, "pods are in the cluster's domain; use hostname, or networks.*.aliases"},
	"services.*.user":               {same, "numbers; of names only root"},
	"services.*.group_add":          {same, "numbers"},
	"services.*.working_dir":        {same, ""},
	"services.*.tty":                {same, ""},
	"services.*.stdin_open":         {same, ""},
	"services.*.init":               {same, ""},
	"services.*.privileged":         {same, ""},
	"services.*.read_only":          {same, ""},
	"services.*.cap_add":            {same, ""},
	"services.*.cap_drop":           {same, ""},
	"services.*.security_opt":       {same, "no-new-privileges, seccomp:unconfined, apparmor"},
	"services.*.sysctls":            {same, "those of a pod; the others after `tutti up --allowed-unsafe-sysctls`"},
	"services.*.ulimits":            {refused, "a pod has the machine's limits; raise those of the machine, or let the program's start lower its own"},
	"services.*.umask":              {refused, "a pod has no such field; let the image's start set it"},
	"services.*.shm_size":           {same, ""},
	"services.*.tmpfs":              {same, "size and mode"},
	"services.*.restart":            {better, "by default a service is started again when it ends; \"no\" is a Job that runs once for each change; on-failure is a Job unless the service has ports, expose or a healthcheck"},
	"services.*.stop_grace_period":  {same, "in whole seconds, upwards"},
	"services.*.stop_signal":        {refused, "the image's own signal is sent; set STOPSIGNAL in the image"},
	"services.*.platform":           {same, "a machine of that architecture"},
	"services.*.pull_policy":        {same, "always, missing, never"},
	"services.*.pull_refresh_after": {refused, "use pull_policy: always, and deploy again"},
	"services.*.runtime":            {better, "a RuntimeClass: process runs it as a plain process of the machine"},
	"services.*.scale":              {same, ""},
	"services.*.profiles":           {same, ""},
	"services.*.extends":            {same, ""},
	"services.*.attach":             {same, "`tutti up` does not stay with the logs; `tutti kubectl logs -f` shows them"},
	"services.*.expose":             {better, "requests go only to those that are healthy, and none is lost in an update"},
	"services.*.links":              {same, "the alias is a name for all services"},
	"services.*.external_links":     {refused, "other projects have their own namespace; use SERVICE.PROJECT as the name"},
	"services.*.extra_hosts":        {same, "host-gateway is this machine"},
	"services.*.dns":                {refused, "names go through the cluster's DNS, which asks this machine's servers; set them there"},
	"services.*.dns_opt":            {same, ""},
	"services.*.dns_search":         {same, "after the cluster's own"},
	"services.*.network_mode":       {same, "host, none, bridge; service: and container: are refused"},
	"services.*.mac_address":        {refused, "a pod has none of its own choice; leave it out"},
	"services.*.ipc":                {same, "host, private, shareable"},
	"services.*.pid":                {same, "host"},
	"services.*.uts":                {refused, "use network_mode: host, which has the machine's name too"},
	"services.*.userns_mode":        {same, "host"},
	"services.*.cgroup":             {refused, "pods have groups of their own; leave it out"},
	"services.*.cgroup_parent":      {refused, "use deploy.resources to share the machine"},
	"services.*.logging":            {better, "the machine keeps and turns over all logs; json-file, local and journald are taken for that"},
	"services.*.devices":            {refused, "use privileged: true and a bind mount of the device, or a device plugin"},
	"services.*.device_cgroup_rules": {refused,
		"use privileged: true, or a device plugin"},
	"services.*.gpus":             {refused, "graphics processors come by a device plugin, which compose has no words for; write a Deployment"},
	"services.*.blkio_config":     {refused, "there are no limits of disk speed; leave it out"},
	"services.*.storage_opt":      {refused, "use tmpfs with a size, or a volume"},
	"services.*.volumes_from":     {refused, "a pod's volumes are its own; name the volume in both services"},
	"services.*.volume_driver":    {refused, "it is the volume's to say; say it under volumes"},
	"services.*.credential_spec":  {refused, "it is Windows'; leave it out"},
	"services.*.isolation":        {refused, "it is Windows'; leave it out"},
	"services.*.use_api_socket":   {refused, "there is no Docker to talk to; use a service account, by a Deployment"},
	"services.*.provider":         {refused, "other programs are not called; run what it provides as a service"},
	"services.*.models":           {refused, "models are not run; make the model's server a service"},
	"services.*.log_driver":       {refused, "use logging.driver"},
	"services.*.log_opt":          {refused, "use logging.options"},
	"services.*.net":              {refused, "use network_mode"},
	"services.*.dockerfile":       {refused, "use build.dockerfile"},
	"services.*.mem_limit":        {same, ""},
	"services.*.mem_reservation":  {same, "what the scheduler keeps free for it"},
	"services.*.mem_swappiness":   {refused, "pods do not swap; leave it out"},
	"services.*.memswap_limit":    {same, "no more than mem_limit: pods do not swap"},
	"services.*.oom_kill_disable": {refused, "nobody may outlive the others so; give it memory enough by mem_limit"},
	"services.*.oom_score_adj":    {refused, "it follows from memory; make mem_reservation and mem_limit equal, which are killed last"},
	"services.*.pids_limit":       {refused, "every pod has at most 1024 processes; leave it out"},
	"services.*.cpus":             {same, ""},
	"services.*.cpu_shares":       {same, ""},
	"services.*.cpu_quota":        {same, ""},
	"services.*.cpu_period":       {same, ""},
	"services.*.cpu_count":        {refused, "it is Windows'; use cpus"},
	"services.*.cpu_percent":      {refused, "it is Windows'; use cpus"},
	"services.*.cpu_rt_period":    {refused, "use cpus"},
	"services.*.cpu_rt_runtime":   {refused, "use cpus"},
	"services.*.cpuset":           {refused, "use cpus; no pod owns a processor"},
	"services.*.develop":          {refused, "sources are not watched yet; run `tutti up` again"},
	"services.*.pre_start":        {refused, "use a service that others depend on by service_completed_successfully"},

	"services.*.post_start.*.command":     {same, "one hook"},
	"services.*.post_start.*.user":        {refused, "hooks run as the service's user; leave it out"},
	"services.*.post_start.*.privileged":  {refused, "hooks have the service's rights; leave it out"},
	"services.*.post_start.*.working_dir": {same, ""},
	"services.*.post_start.*.environment": {same, ""},
	"services.*.pre_stop.*.command":       {same, "one hook"},
	"services.*.pre_stop.*.user":          {refused, "hooks run as the service's user; leave it out"},
	"services.*.pre_stop.*.privileged":    {refused, "hooks have the service's rights; leave it out"},
	"services.*.pre_stop.*.working_dir":   {same, ""},
	"services.*.pre_stop.*.environment":   {same, ""},

	"services.*.depends_on.*.condition": {same, ""},
	"services.*.depends_on.*.restart":   {same, ""},
	"services.*.depends_on.*.required":  {same, ""},

	"services.*.healthcheck.test":           {better, "who is unhealthy gets no requests until it is well again"},
	"services.*.healthcheck.interval":       {better, "also below a second"},
	"services.*.healthcheck.timeout":        {same, "in whole seconds, upwards"},
	"services.*.healthcheck.retries":        {same, ""},
	"services.*.healthcheck.start_period":   {better, "the first check is at once, then ever less often until the interval"},
	"services.*.healthcheck.start_interval": {better, "as start_period"},
	"services.*.healthcheck.disable":        {same, ""},

	"services.*.ports.*.target":       {same, ""},
	"services.*.ports.*.published":    {better, "requests go to all replicas that are healthy, and none is lost in an update"},
	"services.*.ports.*.host_ip":      {same, ""},
	"services.*.ports.*.protocol":     {same, ""},
	"services.*.ports.*.app_protocol": {same, ""},
	"services.*.ports.*.name":         {same, ""},
	"services.*.ports.*.mode":         {same, "host: on the machine that it runs on"},

	"services.*.volumes.*.type":                  {same, "volume, bind, tmpfs, image"},
	"services.*.volumes.*.source":                {same, ""},
	"services.*.volumes.*.target":                {same, ""},
	"services.*.volumes.*.read_only":             {same, ""},
	"services.*.volumes.*.consistency":           {same, "says nothing, as there"},
	"services.*.volumes.*.bind.propagation":      {same, ""},
	"services.*.volumes.*.bind.create_host_path": {same, ""},
	"services.*.volumes.*.bind.selinux":          {refused, "nobody labels files for a pod; do it on the machine"},
	"services.*.volumes.*.bind.recursive":        {same, "enabled, writable, readonly"},
	"services.*.volumes.*.volume.nocopy":         {same, "a new volume is empty"},
	"services.*.volumes.*.volume.subpath":        {same, ""},
	"services.*.volumes.*.volume.labels":         {refused, "a volume has one set of labels; give them under volumes"},
	"services.*.volumes.*.tmpfs.size":            {same, ""},
	"services.*.volumes.*.tmpfs.mode":            {refused, "it is 1777; let the program's start change it"},
	"services.*.volumes.*.image.subpath":         {same, ""},

	"services.*.configs.*.source": {same, ""},
	"services.*.configs.*.target": {same, ""},
	"services.*.configs.*.mode":   {same, ""},
	"services.*.configs.*.uid":    {refused, "files of configurations are root's; use mode"},
	"services.*.configs.*.gid":    {refused, "files of configurations are root's; use mode"},
	"services.*.secrets.*.source": {same, ""},
	"services.*.secrets.*.target": {same, ""},
	"services.*.secrets.*.mode":   {same, ""},
	"services.*.secrets.*.uid":    {refused, "files of secrets are root's; use mode"},
	"services.*.secrets.*.gid":    {refused, "files of secrets are root's; use mode"},

	"services.*.networks.*.aliases":                {same, ""},
	"services.*.networks.*.ipv4_address":           {refused, "addresses are given out; use the service's name"},
	"services.*.networks.*.ipv6_address":           {refused, "addresses are given out; use the service's name"},
	"services.*.networks.*.link_local_ips":         {refused, "addresses are given out; use the service's name"},
	"services.*.networks.*.mac_address":            {refused, "a pod has none of its own choice; leave it out"},
	"services.*.networks.*.driver_opts":            {refused, "a pod has one link; leave it out"},
	"services.*.networks.*.gw_priority":            {refused, "a pod has one link; leave it out"},
	"services.*.networks.*.interface_name":         {refused, "a pod's link is eth0; leave it out"},
	"services.*.networks.*.priority":               {refused, "a pod has one link; leave it out"},
	"services.*.networks.*.use_service_name_alias": {refused, "the service's name is always a name; leave it out"},

	"services.*.deploy.mode":                            {same, "replicated, global, replicated-job"},
	"services.*.deploy.replicas":                        {same, ""},
	"services.*.deploy.labels":                          {same, "annotations of the Deployment"},
	"services.*.deploy.endpoint_mode":                   {same, ""},
	"services.*.deploy.placement.constraints":           {same, "node.hostname, node.id, node.labels.*, node.platform.*"},
	"services.*.deploy.placement.preferences":           {same, "spread over node.labels.*"},
	"services.*.deploy.placement.max_replicas_per_node": {same, "1"},
	"services.*.deploy.resources.limits.cpus":           {same, ""},
	"services.*.deploy.resources.limits.memory":         {same, ""},
	"services.*.deploy.resources.limits.pids":           {refused, "every pod has at most 1024 processes; leave it out"},
	"services.*.deploy.resources.limits.devices":        {refused, "graphics processors come by a device plugin, which compose has no words for; write a Deployment"},
	"services.*.deploy.resources.limits.generic_resources": {refused,
		"they come by a device plugin, which compose has no words for; write a Deployment"},
	"services.*.deploy.resources.reservations.cpus":    {same, ""},
	"services.*.deploy.resources.reservations.memory":  {same, ""},
	"services.*.deploy.resources.reservations.pids":    {refused, "every pod has at most 1024 processes; leave it out"},
	"services.*.deploy.resources.reservations.devices": {refused, "graphics processors come by a device plugin, which compose has no words for; write a Deployment"},
	"services.*.deploy.resources.reservations.generic_resources": {refused,
		"they come by a device plugin, which compose has no words for; write a Deployment"},
	"services.*.deploy.restart_policy.condition":        {same, "as restart"},
	"services.*.deploy.restart_policy.max_attempts":     {same, "of a Job; a service goes on trying, ever less often"},
	"services.*.deploy.restart_policy.delay":            {better, "the first time at once, then ever less often, at most each 5 minutes"},
	"services.*.deploy.restart_policy.window":           {better, "who has run for 10 minutes is well again"},
	"services.*.deploy.update_config.parallelism":       {same, ""},
	"services.*.deploy.update_config.delay":             {same, "in whole seconds, upwards"},
	"services.*.deploy.update_config.order":             {better, "start-first unless the service has volumes: no request is lost"},
	"services.*.deploy.update_config.failure_action":    {same, "pause"},
	"services.*.deploy.update_config.monitor":           {refused, "an update is watched by the healthcheck; leave it out"},
	"services.*.deploy.update_config.max_failure_ratio": {refused, "an update goes on only while all are well; leave it out"},
	"services.*.deploy.rollback_config":                 {refused, "the way back is an update; use update_config"},

	"jobs": {refused, "jobs are not run yet; write a CronJob"},

	"networks.*.name":        {same, "of messages; a network is the project's own"},
	"networks.*.driver":      {same, "bridge, overlay"},
	"networks.*.driver_opts": {refused, "there is one network for all pods; leave it out"},
	"networks.*.ipam":        {refused, "addresses are given out; use names"},
	"networks.*.external":    {refused, "other projects are reached as SERVICE.PROJECT; leave it out"},
	"networks.*.internal":    {refused, "the way out cannot be closed yet; leave it out"},
	"networks.*.attachable":  {same, "says nothing here"},
	"networks.*.enable_ipv4": {same, "true"},
	"networks.*.enable_ipv6": {refused, "pods have addresses of IPv4; leave it out"},
	"networks.*.labels":      {same, "say nothing here"},

	"volumes.*.name":        {same, ""},
	"volumes.*.driver":      {same, "local"},
	"volumes.*.driver_opts": {refused, "use a bind mount for a directory of the machine, or an external claim"},
	"volumes.*.external":    {same, "a PersistentVolumeClaim that is there"},
	"volumes.*.labels":      {same, "annotations of the claim"},

	"configs.*.name":            {same, ""},
	"configs.*.file":            {better, "a change is a new object: it rolls out, and back"},
	"configs.*.content":         {better, "as file"},
	"configs.*.environment":     {better, "as file"},
	"configs.*.external":        {same, "a ConfigMap that is there, with the key of its own name"},
	"configs.*.labels":          {same, "annotations of the ConfigMap"},
	"configs.*.template_driver": {refused, "write what is wanted, or use variables in content"},
	"secrets.*.name":            {same, ""},
	"secrets.*.file":            {better, "a change is a new object: it rolls out, and back"},
	"secrets.*.environment":     {better, "as file"},
	"secrets.*.external":        {same, "a Secret that is there, with the key of its own name"},
	"secrets.*.labels":          {same, "annotations of the Secret"},
	"secrets.*.driver":          {refused, "use file or environment"},
	"secrets.*.driver_opts":     {refused, "use file or environment"},
	"secrets.*.template_driver": {refused, "write what is wanted"},
}

// lookup finds the key that rules a path, and says whether keys below decide.
func lookup(pattern string) (k key, ok, deeper bool) {
	if k, ok = keys[pattern]; ok {
		return k, true, false
	}
	for p := range keys {
		if strings.HasPrefix(p, pattern+".") {
			return key{}, false, true
		}
	}
	return key{}, false, false
}

// checkKeys refuses what the table refuses. The model is a tree of maps and
// lists as the library merged it; what has no value was not given.
func (p *Project) checkKeys(model map[string]any) error {
	return p.checkBelow(nil, nil, model)
}

func (p *Project) checkBelow(path, pattern []string, value any) error {
	children := map[string]any{}
	switch v := value.(type) {
	case map[string]any:
		children = v
	case []any:
		for i, item := range v {
			children[strconv.Itoa(i)] = item
		}
	default:
		return nil
	}
	for _, name := range slices.Sorted(maps.Keys(children)) {
		child := children[name]
		if child == nil || strings.HasPrefix(name, "x-") {
			continue
		}
		at := append(slices.Clip(path), name)
		pat := append(slices.Clip(pattern), name)
		k, ok, deeper := lookup(strings.Join(pat, "."))
		if !ok && !deeper {
			pat = append(slices.Clip(pattern), "*")
			k, ok, deeper = lookup(strings.Join(pat, "."))
		}
		switch {
		case ok && k.standing == refused && !empty(child):
			return p.refuse(k.text, at...)
		case ok:
		case deeper:
			if err := p.checkBelow(at, pat, child); err != nil {
				return err
			}
		default:
			return p.refuse("this version does not know it; take it out", at...)
		}
	}
	return nil
}

// empty says that a value is as good as none.
func empty(v any) bool {
	switch v := v.(type) {
	case nil:
		return true
	case map[string]any:
		return len(v) == 0
	case []any:
		return len(v) == 0
	case string:
		return v == ""
	case bool:
		return !v
	case int:
		return v == 0
	}
	return false
}

// refuse is the error about a key: where it stands, and what to do instead.
func (p *Project) refuse(text string, path ...string) error {
	return fmt.Errorf("%s: %s", p.source.at(path...), text)
}
