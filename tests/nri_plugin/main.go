// nri-plugin is what tests/nri.rs has the daemon start: a plugin on NRI's own library that does what its settings say, and writes down
// what it was told.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/stub"
)

// settings say what the plugin does. A container is meant by its name; "" means each.
type settings struct {
	// File that lines are appended to.
	Log string
	// Container that is changed, or whose creation is refused.
	Container string
	Env       map[string]string
	// Bind mounts: destination and source.
	Mounts map[string]string
	Args   []string
	Memory int64
	Cpus   string
	Pids   int64
	// Classes of block I/O and of Intel RDT.
	Blockio, Rdt string
	// File that a hook of the stage createRuntime writes the container's state to.
	Hook string
	// A device node: path, major and minor.
	Device string
	Sysctl map[string]string
	Refuse string
	// Refuses adjustments of others, with this reason.
	Reject string
	// Events that it never answers, or at which it ends.
	Hang, Die string
	// Memory that the kubelet's updates become.
	UpdateMemory int64
	// Container whose memory is changed when another is made, and to how much.
	Other       string
	OtherMemory int64
	// A file that is waited for: "ID BYTES" is then asked for without being asked.
	Trigger string
}

type plugin struct {
	settings
	stub stub.Stub
	ids  map[string]string
}

// at writes an event down, and hangs or ends where that is wanted.
func (p *plugin) at(event string, words ...string) {
	p.log(append([]string{event}, words...)...)
	if p.Hang == event {
		select {}
	}
	if p.Die == event {
		os.Exit(3)
	}
}

func (p *plugin) log(words ...string) {
	file, err := os.OpenFile(p.Log, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(4)
	}
	defer file.Close()
	fmt.Fprintln(file, strings.Join(words, " "))
}

func (p *plugin) Configure(_ context.Context, config, runtime, version string) (stub.EventMask, error) {
	if err := json.Unmarshal([]byte(config), &p.settings); err != nil {
		return 0, err
	}
	p.at("Configure", runtime)
	if p.Trigger != "" {
		go p.wait()
	}
	return 0, nil
}

// wait asks for what the trigger says, once.
func (p *plugin) wait() {
	for {
		text, err := os.ReadFile(p.Trigger)
		if err == nil && strings.HasSuffix(string(text), "\n") {
			var id string
			var bytes int64
			fmt.Sscan(string(text), &id, &bytes)
			failed, err := p.stub.UpdateContainers([]*api.ContainerUpdate{limits(id, bytes)})
			p.log("Updated", fmt.Sprint(len(failed)), fmt.Sprint(err))
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func limits(id string, bytes int64) *api.ContainerUpdate {
	update := &api.ContainerUpdate{}
	update.SetContainerId(id)
	update.SetLinuxMemoryLimit(bytes)
	return update
}

func (p *plugin) Synchronize(_ context.Context, pods []*api.PodSandbox, containers []*api.Container) ([]*api.ContainerUpdate, error) {
	words := []string{}
	for _, pod := range pods {
		words = append(words, "pod="+pod.Name)
	}
	for _, c := range containers {
		words = append(words, "container="+c.Name, c.State.String())
		p.ids[c.Name] = c.Id
	}
	p.at("Synchronize", words...)
	return nil, nil
}

func (p *plugin) RunPodSandbox(_ context.Context, pod *api.PodSandbox) error {
	p.at("RunPodSandbox", pod.Name, pod.RuntimeHandler, strings.Join(pod.Ips, ","))
	return nil
}

func (p *plugin) StopPodSandbox(_ context.Context, pod *api.PodSandbox) error {
	p.at("StopPodSandbox", pod.Name)
	return nil
}

func (p *plugin) RemovePodSandbox(_ context.Context, pod *api.PodSandbox) error {
	p.at("RemovePodSandbox", pod.Name)
	return nil
}

func (p *plugin) CreateContainer(_ context.Context, pod *api.PodSandbox, c *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
	p.ids[c.Name] = c.Id
	p.at("CreateContainer", pod.Name, c.Name, strings.Join(c.Args, ","), "env="+strings.Join(c.Env, ","))
	if p.Container != "" && p.Container != c.Name {
		return nil, nil, nil
	}
	if p.Refuse != "" {
		return nil, nil, errors.New(p.Refuse)
	}
	adjust := &api.ContainerAdjustment{}
	for name, value := range p.Env {
		adjust.AddEnv(name, value)
	}
	for place, source := range p.Mounts {
		adjust.AddMount(&api.Mount{Destination: place, Source: source, Type: "bind", Options: []string{"rbind", "ro"}})
	}
	if len(p.Args) > 0 {
		adjust.SetArgs(p.Args)
	}
	if p.Memory > 0 {
		adjust.SetLinuxMemoryLimit(p.Memory)
	}
	if p.Cpus != "" {
		adjust.SetLinuxCPUSetCPUs(p.Cpus)
	}
	if p.Pids > 0 {
		adjust.SetLinuxPidLimits(p.Pids)
	}
	if p.Blockio != "" {
		adjust.SetLinuxBlockIOClass(p.Blockio)
	}
	if p.Rdt != "" {
		adjust.SetLinuxRDTClass(p.Rdt)
	}
	for name, value := range p.Sysctl {
		adjust.SetLinuxSysctl(name, value)
	}
	if p.Hook != "" {
		hook := &api.Hook{Path: "/bin/sh", Args: []string{"sh", "-c", "/bin/cat > " + p.Hook}}
		adjust.AddHooks(&api.Hooks{CreateRuntime: []*api.Hook{hook}})
	}
	if p.Device != "" {
		device := &api.LinuxDevice{Type: "c"}
		fmt.Sscan(p.Device, &device.Path, &device.Major, &device.Minor)
		adjust.AddDevice(device)
	}
	var updates []*api.ContainerUpdate
	if id := p.ids[p.Other]; id != "" && p.Other != c.Name {
		updates = append(updates, limits(id, p.OtherMemory))
	}
	return adjust, updates, nil
}

func (p *plugin) ValidateContainerAdjustment(_ context.Context, req *api.ValidateContainerAdjustmentRequest) error {
	owner, _ := req.Owners.EnvOwner(req.Container.Id, "PLUGGED")
	p.at("ValidateContainerAdjustment", req.Container.Name, "owner="+owner)
	if p.Reject != "" && (p.Container == "" || p.Container == req.Container.Name) {
		return errors.New(p.Reject)
	}
	return nil
}

func (p *plugin) PostCreateContainer(_ context.Context, _ *api.PodSandbox, c *api.Container) error {
	p.at("PostCreateContainer", c.Name, c.State.String())
	return nil
}

func (p *plugin) StartContainer(_ context.Context, _ *api.PodSandbox, c *api.Container) error {
	p.at("StartContainer", c.Name)
	return nil
}

func (p *plugin) PostStartContainer(_ context.Context, _ *api.PodSandbox, c *api.Container) error {
	p.at("PostStartContainer", c.Name, c.State.String())
	return nil
}

func (p *plugin) UpdateContainer(_ context.Context, _ *api.PodSandbox, c *api.Container, r *api.LinuxResources) ([]*api.ContainerUpdate, error) {
	p.at("UpdateContainer", c.Name, fmt.Sprint(r.GetMemory().GetLimit().GetValue()))
	if p.UpdateMemory > 0 {
		return []*api.ContainerUpdate{limits(c.Id, p.UpdateMemory)}, nil
	}
	return nil, nil
}

func (p *plugin) PostUpdateContainer(_ context.Context, _ *api.PodSandbox, c *api.Container) error {
	p.at("PostUpdateContainer", c.Name, fmt.Sprint(c.GetLinux().GetResources().GetMemory().GetLimit().GetValue()))
	return nil
}

func (p *plugin) StopContainer(_ context.Context, _ *api.PodSandbox, c *api.Container) ([]*api.ContainerUpdate, error) {
	p.at("StopContainer", c.Name, fmt.Sprint(c.ExitCode))
	return nil, nil
}

func (p *plugin) RemoveContainer(_ context.Context, _ *api.PodSandbox, c *api.Container) error {
	p.at("RemoveContainer", c.Name)
	return nil
}

func main() {
	p := &plugin{ids: map[string]string{}}
	options := []stub.Option{}
	// One that connects by itself: its name, index, settings and the socket are arguments.
	if len(os.Args) == 5 {
		options = append(options, stub.WithPluginName(os.Args[1]), stub.WithPluginIdx(os.Args[2]), stub.WithSocketPath(os.Args[4]))
		if err := json.Unmarshal([]byte(os.Args[3]), &p.settings); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(2)
		}
	}
	made, err := stub.New(&connects{p}, options...)
	if err == nil {
		p.stub = made
		err = made.Run(context.Background())
	}
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

// connects keeps the settings of a plugin that has none from the runtime.
type connects struct{ *plugin }

func (c *connects) Configure(ctx context.Context, config, runtime, version string) (stub.EventMask, error) {
	if config == "" {
		text, err := json.Marshal(c.settings)
		if err != nil {
			return 0, err
		}
		config = string(text)
	}
	return c.plugin.Configure(ctx, config, runtime, version)
}
