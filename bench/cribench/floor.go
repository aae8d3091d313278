package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/containernetworking/cni/libcni"
	"golang.org/x/sys/unix"
)

// childrenCPU is what the programs that have been started and waited for have used, with all that they waited for.
func childrenCPU() float64 {
	var u unix.Rusage
	if unix.Getrusage(unix.RUSAGE_CHILDREN, &u) != nil {
		return 0
	}
	return float64(u.Utime.Nano()+u.Stime.Nano()) / 1e6
}

// newNetns makes a network namespace that is kept at path, by a thread that ends with it.
func newNetns(path string) error {
	if err := os.WriteFile(path, nil, 0o444); err != nil {
		return err
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			err = unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, "")
		}
		done <- err
	}()
	return <-done
}

// floor measures what no runtime can do without: the network's plugins and the OCI runtime alone.
func floor(ctx context.Context) error {
	list, err := libcni.LoadNetworkConf(*floorConf, *floorNet)
	if err != nil {
		return err
	}
	var seccomp any
	if *floorSeccomp != "" {
		b, err := os.ReadFile(*floorSeccomp)
		if err == nil {
			err = json.Unmarshal(b, &seccomp)
		}
		if err != nil {
			return err
		}
	}
	cni := libcni.NewCNIConfig(strings.Split(*floorPlugins, ":"), nil)
	dir, err := os.MkdirTemp("", "floor")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	for _, net := range strings.Split(*nets, ",") {
		s := &samples{}
		cpu := childrenCPU()
		for i := 0; i < *num; i++ {
			if err := floorLife(ctx, s, cni, list, dir, net, seccomp); err != nil {
				return err
			}
		}
		for _, op := range s.order {
			add("floor", net, op, "ms", s.m[op])
		}
		add("floor", net, "CPU per pod life", "cpu-ms", []float64{(childrenCPU() - cpu) / float64(*num)})
	}
	if err := floorExecs(dir, seccomp); err != nil {
		return err
	}
	return floorLines(dir, seccomp)
}

func crunCommand(args ...string) *exec.Cmd {
	return exec.Command(*floorCrun, append([]string{"--cgroup-manager=cgroupfs"}, args...)...)
}

func crun(args ...string) error {
	c := crunCommand(args...)
	// Not a pipe: the container inherits it, and its end would be waited for.
	words, err := os.CreateTemp("", "crun")
	if err != nil {
		return err
	}
	defer os.Remove(words.Name())
	defer words.Close()
	c.Stdout, c.Stderr = words, words
	if err := c.Run(); err != nil {
		b, _ := os.ReadFile(words.Name())
		return fmt.Errorf("crun %s: %w: %s", strings.Join(args, " "), err, b)
	}
	return nil
}

// pause is what containers of the other suites run.
var pause = []string{"sh", "-c", "trap 'exit 0' TERM; while :; do sleep 3600 & wait $!; done"}

// bundle writes the bundle of a container like those of the other suites.
func bundle(dir, id, netns string, seccomp any, args []string) (string, error) {
	b := filepath.Join(dir, id)
	if err := os.MkdirAll(filepath.Join(b, "rootfs"), 0o755); err != nil {
		return "", err
	}
	c := exec.Command(*floorCrun, "spec")
	c.Dir = b
	if out, err := c.CombinedOutput(); err != nil {
		return "", fmt.Errorf("crun spec: %w: %s", err, out)
	}
	path := filepath.Join(b, "config.json")
	text, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	var spec map[string]any
	if err := json.Unmarshal(text, &spec); err != nil {
		return "", err
	}
	process, linux := spec["process"].(map[string]any), spec["linux"].(map[string]any)
	process["terminal"] = false
	process["args"] = args
	spec["root"] = map[string]any{"path": *floorRootfs, "readonly": false}
	linux["cgroupsPath"] = "/floor/" + id
	linux["seccomp"] = seccomp
	var kept []any
	for _, n := range linux["namespaces"].([]any) {
		switch t := n.(map[string]any)["type"]; {
		case t == "network" && netns == "":
		case t == "network":
			kept = append(kept, map[string]any{"type": "network", "path": netns})
		default:
			kept = append(kept, n)
		}
	}
	linux["namespaces"] = kept
	if text, err = json.Marshal(spec); err != nil {
		return "", err
	}
	return b, os.WriteFile(path, text, 0o644)
}

func floorLife(ctx context.Context, s *samples, cni *libcni.CNIConfig, list *libcni.NetworkConfigList, dir, net string, seccomp any) error {
	id := fmt.Sprintf("floor-%s-%d", run, seq.Add(1))
	netns := ""
	var conf *libcni.RuntimeConf
	if net == "bridge" {
		netns = filepath.Join(dir, id+".net")
		conf = &libcni.RuntimeConf{ContainerID: id, NetNS: netns, IfName: "eth0"}
	}
	b, err := bundle(dir, id, netns, seccomp, pause)
	if err != nil {
		return err
	}
	// The bundle itself is no part of the floor.
	t := time.Now()
	if conf != nil {
		if err := newNetns(netns); err != nil {
			return err
		}
		if err := s.time("CNI ADD", func() error { _, e := cni.AddNetworkList(ctx, list, conf); return e }); err != nil {
			return err
		}
	}
	if err := s.time("crun create", func() error { return crun("create", "--bundle", b, id) }); err != nil {
		return err
	}
	if err := s.time("crun start", func() error { return crun("start", id) }); err != nil {
		return err
	}
	s.put("pod+container to RUNNING", ms(time.Since(t)))
	t = time.Now()
	if err := s.time("crun delete", func() error { return crun("delete", "--force", id) }); err != nil {
		return err
	}
	if conf != nil {
		if err := s.time("CNI DEL", func() error { return cni.DelNetworkList(ctx, list, conf) }); err != nil {
			return err
		}
		if err := unix.Unmount(netns, unix.MNT_DETACH); err != nil {
			return err
		}
	}
	s.put("whole teardown", ms(time.Since(t)))
	return nil
}

func floorExecs(dir string, seccomp any) error {
	id := "floor-exec-" + run
	b, err := bundle(dir, id, "", seccomp, pause)
	if err != nil {
		return err
	}
	if err := crun("run", "--detach", "--bundle", b, id); err != nil {
		return err
	}
	defer crun("delete", "--force", id)
	s, cpu := &samples{}, childrenCPU()
	for i := 0; i < *execs; i++ {
		if err := s.time("crun exec true", func() error { return crun("exec", id, "true") }); err != nil {
			return err
		}
	}
	for _, op := range s.order {
		add("floor", "exec", op, "ms", s.m[op])
	}
	add("floor", "exec", "CPU per exec", "cpu-ms", []float64{(childrenCPU() - cpu) / float64(*execs)})
	var rates []float64
	for i := 0; i < *streamN; i++ {
		rate, err := floorStream(id)
		if err != nil {
			return err
		}
		rates = append(rates, rate)
	}
	add("floor", "exec", "stdin to stdout", "MB/s", rates)
	return nil
}

// floorStream is oneStream with nothing but two pipes between this program and `cat`.
func floorStream(id string) (float64, error) {
	in, out := &zeros{left: int64(*streamMB) * 1e6}, new(counter)
	c := crunCommand("exec", id, "cat")
	c.Stdin, c.Stdout = in, out
	if err := c.Run(); err != nil {
		return 0, err
	}
	took := time.Since(in.begun)
	if int64(*out) != int64(*streamMB)*1e6 {
		return 0, fmt.Errorf("%d bytes came back of %d MB", *out, *streamMB)
	}
	return float64(*streamMB) / took.Seconds(), nil
}

// floorLines is oneLog without a log: what the container writes is copied from a pipe to a file as it comes.
func floorLines(dir string, seccomp any) error {
	var rates []float64
	for i := 0; i < *logN; i++ {
		id := fmt.Sprintf("floor-log-%s-%d", run, i)
		b, err := bundle(dir, id, "", seccomp, logWriter())
		if err != nil {
			return err
		}
		rate, err := floorLog(id, b, filepath.Join(dir, id+".log"))
		if e := crun("delete", "--force", id); err == nil {
			err = e
		}
		if err != nil {
			return err
		}
		rates = append(rates, rate)
	}
	add("floor", fmt.Sprintf("%d lines", *logLines), "lines", "lines/s", rates)
	return nil
}

func floorLog(id, bundle, path string) (float64, error) {
	log, err := os.Create(path)
	if err != nil {
		return 0, err
	}
	defer os.Remove(path)
	defer log.Close()
	r, w, err := os.Pipe()
	if err != nil {
		return 0, err
	}
	defer r.Close()
	c := crunCommand("create", "--bundle", bundle, id)
	c.Stdout = w
	err = c.Run()
	w.Close() // the container's copy of it alone is open now
	if err != nil {
		return 0, fmt.Errorf("crun create: %w", err)
	}
	t := time.Now()
	if err := crun("start", id); err != nil {
		return 0, err
	}
	// Not io.Copy: it would splice, and no log can do without looking at what it keeps.
	for buf := make([]byte, 64<<10); ; {
		n, err := r.Read(buf)
		if n > 0 {
			if _, err := log.Write(buf[:n]); err != nil {
				return 0, err
			}
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			return 0, err
		}
	}
	return float64(*logLines) / time.Since(t).Seconds(), nil
}
