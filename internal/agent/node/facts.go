package node

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	goruntime "runtime"
	"strings"

	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/kubernetes/pkg/kubelet/stats/pidlimit"
)

// readCapacity reads what the machine has, process ids among it.
func readCapacity(dataDir string, maxPods int) (v1.ResourceList, error) {
	var mem unix.Sysinfo_t
	if err := unix.Sysinfo(&mem); err != nil {
		return nil, fmt.Errorf("read the machine's memory: %w", err)
	}
	if err := os.MkdirAll(dataDir, 0o700); err != nil {
		return nil, fmt.Errorf("make data directory: %w", err)
	}
	var disk unix.Statfs_t
	if err := unix.Statfs(dataDir, &disk); err != nil {
		return nil, fmt.Errorf("read the size of the disk below %s: %w", dataDir, err)
	}
	list := v1.ResourceList{
		v1.ResourceCPU:              *resource.NewQuantity(int64(goruntime.NumCPU()), resource.DecimalSI),
		v1.ResourceMemory:           *resource.NewQuantity(int64(mem.Totalram)*int64(mem.Unit), resource.BinarySI),
		v1.ResourceEphemeralStorage: *resource.NewQuantity(int64(disk.Blocks)*disk.Bsize, resource.BinarySI),
		v1.ResourcePods:             *resource.NewQuantity(int64(maxPods), resource.DecimalSI),
	}
	ids, err := pidlimit.Stats()
	if err != nil || ids.MaxPID == nil {
		return nil, fmt.Errorf("read how many processes the machine can have: %w", err)
	}
	list[pidlimit.PIDs] = *resource.NewQuantity(*ids.MaxPID, resource.DecimalSI)
	sizes, _ := filepath.Glob("/sys/kernel/mm/hugepages/hugepages-*kB")
	for _, dir := range sizes {
		var kb, n int64
		if _, err := fmt.Sscanf(filepath.Base(dir), "hugepages-%dkB", &kb); err != nil {
			continue
		}
		if _, err := fmt.Sscan(read(filepath.Join(dir, "nr_hugepages")), &n); err != nil {
			continue
		}
		size := resource.NewQuantity(kb<<10, resource.BinarySI)
		list[v1.ResourceName(v1.ResourceHugePagesPrefix+size.String())] = *resource.NewQuantity(n*kb<<10, resource.BinarySI)
	}
	return list, nil
}

// systemInfo reads what the machine is.
func systemInfo(version string) v1.NodeSystemInfo {
	var u unix.Utsname
	_ = unix.Uname(&u) // cannot fail with a valid pointer
	machineID := strings.TrimSpace(read("/etc/machine-id"))
	uuid := strings.TrimSpace(read("/sys/class/dmi/id/product_uuid"))
	if uuid == "" {
		uuid = machineID
	}
	return v1.NodeSystemInfo{
		MachineID:               machineID,
		SystemUUID:              uuid,
		BootID:                  strings.TrimSpace(read("/proc/sys/kernel/random/boot_id")),
		KernelVersion:           unix.ByteSliceToString(u.Release[:]),
		OSImage:                 osImage(),
		ContainerRuntimeVersion: "tutti://" + version,
		KubeletVersion:          KubernetesVersion + "+tutti." + version,
		OperatingSystem:         goruntime.GOOS,
		Architecture:            goruntime.GOARCH,
		Swap:                    swap(),
	}
}

func osImage() string {
	f, err := os.Open("/etc/os-release")
	if err != nil {
		return "Linux"
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if name, ok := strings.CutPrefix(s.Text(), "PRETTY_NAME="); ok {
			return strings.Trim(name, `"'`)
		}
	}
	return "Linux"
}

func swap() *v1.NodeSwapStatus {
	var mem unix.Sysinfo_t
	if unix.Sysinfo(&mem) != nil || mem.Totalswap == 0 {
		return nil
	}
	n := int64(mem.Totalswap) * int64(mem.Unit)
	return &v1.NodeSwapStatus{Capacity: &n}
}

// read returns a small file's content, "" if it cannot be read.
func read(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	return string(b)
}
