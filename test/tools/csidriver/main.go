// Command csidriver is a CSI driver for tests: its volumes are directories
// and files of its node. It registers itself with the kubelet of its node.
package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"
)

const (
	name = "test.csi.tutti.dev"
	// maxVolumes is how many of its volumes a node can have attached.
	maxVolumes = 2
)

func main() {
	if len(os.Args) != 5 {
		fmt.Fprintln(os.Stderr, "usage: csidriver DATA SOCKET REGISTRATION-SOCKET SOCKET-AS-THE-KUBELET-KNOWS-IT")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Args[2], os.Args[3], os.Args[4]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(data, socket, registered, endpoint string) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	d := &driver{data: data, node: os.Getenv("NODE")}
	server := grpc.NewServer(grpc.UnaryInterceptor(d.note))
	csi.RegisterIdentityServer(server, d)
	csi.RegisterControllerServer(server, d)
	csi.RegisterNodeServer(server, d)
	register := grpc.NewServer()
	registration.RegisterRegistrationServer(register, registrar{endpoint: endpoint})
	failed := make(chan error, 2)
	for path, s := range map[string]*grpc.Server{socket: server, registered: register} {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		l, err := net.Listen("unix", path)
		if err != nil {
			return err
		}
		go func() { failed <- s.Serve(l) }()
	}
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	register.Stop()
	server.GracefulStop()
	return nil
}

type registrar struct {
	registration.UnimplementedRegistrationServer
	endpoint string
}

func (r registrar) GetInfo(context.Context, *registration.InfoRequest) (*registration.PluginInfo, error) {
	return &registration.PluginInfo{Type: registration.CSIPlugin, Name: name, Endpoint: r.endpoint, SupportedVersions: []string{"1.0.0"}}, nil
}

func (r registrar) NotifyRegistrationStatus(_ context.Context, s *registration.RegistrationStatus) (*registration.RegistrationStatusResponse, error) {
	fmt.Println("registered:", s.PluginRegistered, s.Error)
	return &registration.RegistrationStatusResponse{}, nil
}

// driver keeps a volume as DATA/ID, a directory or a file, and the loop device
// of a file in use as DATA/ID.loop.
type driver struct {
	csi.UnimplementedIdentityServer
	csi.UnimplementedControllerServer
	csi.UnimplementedNodeServer
	data, node string
	mu         sync.Mutex
}

// note has one call done at a time and says what was asked for.
func (d *driver) note(ctx context.Context, request any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	response, err := handle(ctx, request)
	_, call, _ := strings.Cut(info.FullMethod[1:], "/")
	if v, ok := request.(interface{ GetVolumeId() string }); ok {
		call += " " + v.GetVolumeId()
	}
	fmt.Println(call, status.Code(err), err)
	return response, err
}

func (d *driver) path(id string) (string, error) {
	if !filepath.IsLocal(id) || strings.Contains(id, "/") {
		return "", status.Errorf(codes.InvalidArgument, "bad volume %q", id)
	}
	return filepath.Join(d.data, id), nil
}

func (d *driver) GetPluginInfo(context.Context, *csi.GetPluginInfoRequest) (*csi.GetPluginInfoResponse, error) {
	return &csi.GetPluginInfoResponse{Name: name, VendorVersion: "1"}, nil
}

func (d *driver) Probe(context.Context, *csi.ProbeRequest) (*csi.ProbeResponse, error) {
	return &csi.ProbeResponse{}, nil
}

func (d *driver) GetPluginCapabilities(context.Context, *csi.GetPluginCapabilitiesRequest) (*csi.GetPluginCapabilitiesResponse, error) {
	return &csi.GetPluginCapabilitiesResponse{Capabilities: []*csi.PluginCapability{
		{Type: &csi.PluginCapability_Service_{Service: &csi.PluginCapability_Service{Type: csi.PluginCapability_Service_CONTROLLER_SERVICE}}},
		{Type: &csi.PluginCapability_VolumeExpansion_{VolumeExpansion: &csi.PluginCapability_VolumeExpansion{Type: csi.PluginCapability_VolumeExpansion_ONLINE}}},
	}}, nil
}

func (d *driver) ControllerGetCapabilities(context.Context, *csi.ControllerGetCapabilitiesRequest) (*csi.ControllerGetCapabilitiesResponse, error) {
	r := &csi.ControllerGetCapabilitiesResponse{}
	for _, kind := range []csi.ControllerServiceCapability_RPC_Type{
		csi.ControllerServiceCapability_RPC_CREATE_DELETE_VOLUME,
		csi.ControllerServiceCapability_RPC_PUBLISH_UNPUBLISH_VOLUME,
		csi.ControllerServiceCapability_RPC_EXPAND_VOLUME,
	} {
		r.Capabilities = append(r.Capabilities, &csi.ControllerServiceCapability{Type: &csi.ControllerServiceCapability_Rpc{Rpc: &csi.ControllerServiceCapability_RPC{Type: kind}}})
	}
	return r, nil
}

func (d *driver) CreateVolume(_ context.Context, r *csi.CreateVolumeRequest) (*csi.CreateVolumeResponse, error) {
	path, err := d.path(r.Name)
	if err != nil {
		return nil, err
	}
	size := max(r.GetCapacityRange().GetRequiredBytes(), 1<<20)
	if r.VolumeCapabilities[0].GetBlock() != nil {
		f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		err = f.Truncate(size)
		if err != nil {
			return nil, err
		}
	} else if err := os.MkdirAll(path, 0o755); err != nil {
		return nil, err
	}
	return &csi.CreateVolumeResponse{Volume: &csi.Volume{VolumeId: r.Name, CapacityBytes: size}}, nil
}

func (d *driver) DeleteVolume(_ context.Context, r *csi.DeleteVolumeRequest) (*csi.DeleteVolumeResponse, error) {
	path, err := d.path(r.VolumeId)
	if err != nil {
		return nil, err
	}
	return &csi.DeleteVolumeResponse{}, os.RemoveAll(path)
}

func (d *driver) ControllerPublishVolume(_ context.Context, r *csi.ControllerPublishVolumeRequest) (*csi.ControllerPublishVolumeResponse, error) {
	return &csi.ControllerPublishVolumeResponse{PublishContext: map[string]string{"attached": r.NodeId}}, nil
}

func (d *driver) ControllerUnpublishVolume(context.Context, *csi.ControllerUnpublishVolumeRequest) (*csi.ControllerUnpublishVolumeResponse, error) {
	return &csi.ControllerUnpublishVolumeResponse{}, nil
}

func (d *driver) ControllerExpandVolume(_ context.Context, r *csi.ControllerExpandVolumeRequest) (*csi.ControllerExpandVolumeResponse, error) {
	return &csi.ControllerExpandVolumeResponse{CapacityBytes: r.CapacityRange.RequiredBytes, NodeExpansionRequired: true}, nil
}

func (d *driver) NodeGetInfo(context.Context, *csi.NodeGetInfoRequest) (*csi.NodeGetInfoResponse, error) {
	return &csi.NodeGetInfoResponse{NodeId: d.node, MaxVolumesPerNode: maxVolumes}, nil
}

func (d *driver) NodeGetCapabilities(context.Context, *csi.NodeGetCapabilitiesRequest) (*csi.NodeGetCapabilitiesResponse, error) {
	r := &csi.NodeGetCapabilitiesResponse{}
	for _, kind := range []csi.NodeServiceCapability_RPC_Type{
		csi.NodeServiceCapability_RPC_STAGE_UNSTAGE_VOLUME, csi.NodeServiceCapability_RPC_EXPAND_VOLUME, csi.NodeServiceCapability_RPC_GET_VOLUME_STATS,
	} {
		r.Capabilities = append(r.Capabilities, &csi.NodeServiceCapability{Type: &csi.NodeServiceCapability_Rpc{Rpc: &csi.NodeServiceCapability_RPC{Type: kind}}})
	}
	return r, nil
}

func (d *driver) NodeStageVolume(_ context.Context, r *csi.NodeStageVolumeRequest) (*csi.NodeStageVolumeResponse, error) {
	path, err := d.path(r.VolumeId)
	if err != nil {
		return nil, err
	}
	if r.VolumeCapability.GetBlock() == nil {
		return &csi.NodeStageVolumeResponse{}, bind(path, r.StagingTargetPath, false)
	}
	if _, err := os.Readlink(path + ".loop"); err == nil {
		return &csi.NodeStageVolumeResponse{}, nil
	}
	device, err := attach(path)
	if err != nil {
		return nil, err
	}
	return &csi.NodeStageVolumeResponse{}, os.Symlink(device, path+".loop")
}

func (d *driver) NodeUnstageVolume(_ context.Context, r *csi.NodeUnstageVolumeRequest) (*csi.NodeUnstageVolumeResponse, error) {
	path, err := d.path(r.VolumeId)
	if err != nil {
		return nil, err
	}
	if device, err := os.Readlink(path + ".loop"); err == nil {
		f, err := os.Open(device)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		if err := unix.IoctlSetInt(int(f.Fd()), unix.LOOP_CLR_FD, 0); err != nil {
			return nil, fmt.Errorf("detach %s: %w", device, err)
		}
		return &csi.NodeUnstageVolumeResponse{}, os.Remove(path + ".loop")
	}
	return &csi.NodeUnstageVolumeResponse{}, unmount(r.StagingTargetPath)
}

func (d *driver) NodePublishVolume(_ context.Context, r *csi.NodePublishVolumeRequest) (*csi.NodePublishVolumeResponse, error) {
	path, err := d.path(r.VolumeId)
	if err != nil {
		return nil, err
	}
	done := &csi.NodePublishVolumeResponse{}
	switch {
	case r.VolumeCapability.GetBlock() != nil:
		device, err := os.Readlink(path + ".loop")
		if err != nil {
			return nil, err
		}
		if err := os.MkdirAll(filepath.Dir(r.TargetPath), 0o750); err != nil {
			return nil, err
		}
		f, err := os.OpenFile(r.TargetPath, os.O_CREATE, 0o600)
		if err != nil {
			return nil, err
		}
		f.Close()
		return done, bind(device, r.TargetPath, r.Readonly)
	case r.VolumeContext["csi.storage.k8s.io/ephemeral"] == "true":
		if err := os.MkdirAll(path, 0o755); err != nil {
			return nil, err
		}
		who := r.VolumeContext["csi.storage.k8s.io/pod.name"] + " " + r.VolumeContext["says"] + "\n"
		if err := os.WriteFile(filepath.Join(path, "who"), []byte(who), 0o640); err != nil {
			return nil, err
		}
	case r.PublishContext["attached"] != d.node:
		return nil, status.Errorf(codes.FailedPrecondition, "volume %s is attached to %q", r.VolumeId, r.PublishContext["attached"])
	default:
		path = r.StagingTargetPath
	}
	if err := os.MkdirAll(r.TargetPath, 0o750); err != nil {
		return nil, err
	}
	return done, bind(path, r.TargetPath, r.Readonly)
}

func (d *driver) NodeUnpublishVolume(_ context.Context, r *csi.NodeUnpublishVolumeRequest) (*csi.NodeUnpublishVolumeResponse, error) {
	if err := unmount(r.TargetPath); err != nil {
		return nil, err
	}
	if err := os.Remove(r.TargetPath); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	// Inline volumes, whose names Kubernetes makes, go with their pod.
	if path, err := d.path(r.VolumeId); err == nil && strings.HasPrefix(r.VolumeId, "csi-") {
		return &csi.NodeUnpublishVolumeResponse{}, os.RemoveAll(path)
	}
	return &csi.NodeUnpublishVolumeResponse{}, nil
}

func (d *driver) NodeExpandVolume(_ context.Context, r *csi.NodeExpandVolumeRequest) (*csi.NodeExpandVolumeResponse, error) {
	size := r.GetCapacityRange().GetRequiredBytes()
	return &csi.NodeExpandVolumeResponse{CapacityBytes: size}, os.WriteFile(filepath.Join(r.VolumePath, "grown"), fmt.Appendln(nil, size), 0o644)
}

// NodeGetVolumeStats tells of every volume the same: who sees it knows whom it
// comes from.
func (d *driver) NodeGetVolumeStats(context.Context, *csi.NodeGetVolumeStatsRequest) (*csi.NodeGetVolumeStatsResponse, error) {
	return &csi.NodeGetVolumeStatsResponse{Usage: []*csi.VolumeUsage{{Unit: csi.VolumeUsage_BYTES, Total: 4096, Used: 1024, Available: 3072}}}, nil
}

// bind mounts what is at source on target, which is there, once.
func bind(source, target string, readOnly bool) error {
	var stat unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, target, unix.AT_SYMLINK_NOFOLLOW, 0, &stat); err != nil {
		return fmt.Errorf("look at %s: %w", target, err)
	}
	if stat.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0 {
		return nil
	}
	if err := unix.Mount(source, target, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind %s to %s: %w", source, target, err)
	}
	if readOnly {
		return unix.Mount("", target, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, "")
	}
	return nil
}

func unmount(target string) error {
	err := unix.Unmount(target, unix.UMOUNT_NOFOLLOW)
	if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmount %s: %w", target, err)
	}
	return nil
}

// attach gives a file a loop device.
func attach(path string) (string, error) {
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return "", err
	}
	defer control.Close()
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return "", err
	}
	defer file.Close()
	for range 20 {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return "", fmt.Errorf("find a loop device: %w", err)
		}
		device := fmt.Sprintf("/dev/loop%d", n)
		loop, err := os.OpenFile(device, os.O_RDWR, 0)
		if err != nil {
			return "", err
		}
		err = unix.IoctlLoopConfigure(int(loop.Fd()), &unix.LoopConfig{Fd: uint32(file.Fd())})
		loop.Close()
		if err == nil {
			return device, nil
		}
		if !errors.Is(err, unix.EBUSY) { // else somebody was faster
			return "", fmt.Errorf("attach %s to %s: %w", path, device, err)
		}
	}
	return "", errors.New("no loop device is free")
}
