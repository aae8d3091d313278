// cribench measures a CRI runtime over one gRPC connection. See README.md.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

var (
	endpoint     = flag.String("endpoint", "unix:///run/containerd/containerd.sock", "CRI runtime socket")
	imgEndpoint  = flag.String("image-endpoint", "", "CRI image socket (default: --endpoint)")
	handler      = flag.String("runtime-handler", "", "runtime handler of every pod")
	image        = flag.String("image", "registry.k8s.io/e2e-test-images/busybox:1.29-2", "image with /bin/sh, true and sleep")
	suites       = flag.String("suites", "lifecycle,exec,density,pull", "what to run, in order: lifecycle, exec, density, pull, idle, records, stream, logs; or floor alone, without a runtime")
	nets         = flag.String("nets", "bridge,host", "pod networks of the lifecycle suite: bridge (CNI), host")
	concs        = flag.String("conc", "1,4,10", "concurrencies of the lifecycle suite")
	num          = flag.Int("n", 30, "pods per lifecycle scenario")
	pods         = flag.Int("pods", 100, "pods of the density suite")
	par          = flag.Int("par", 10, "parallelism of the density suite")
	densityNet   = flag.String("density-net", "bridge", "pod network of the density suite")
	execs        = flag.Int("execs", 100, "ExecSync calls of the exec suite")
	lists        = flag.Int("lists", 30, "calls of each kind of list with all pods up")
	pullImage    = flag.String("pull-image", "", "image of the pull suite")
	pullN        = flag.Int("pull-n", 5, "pulls of the pull suite")
	pullURL      = flag.String("pull-manifest-url", "", "URL of that image's manifest, to add up its compressed bytes")
	pidFile      = flag.String("pid-file", "", "file with the daemon's pid, for memory")
	comms        = flag.String("helper-comms", "containerd-shim,pause,conmon", "prefixes of the names of helper processes counted as per-pod overhead")
	cpuDir       = flag.String("cpu-cgroup", "", "cgroup directory that the daemon and its helpers run in (cpuacct.usage or cpu.stat)")
	restartCmd   = flag.String("restart-cmd", "", "shell command that kills (-9) and starts the daemon again; run with all pods up")
	restartN     = flag.Int("restart-n", 3, "how many restarts")
	logRoot      = flag.String("log-dir", "/var/log/pods-cribench", "where pod logs go")
	parent       = flag.String("cgroup-parent", "", "cgroup parent of every pod")
	jsonOut      = flag.String("json", "", "write the results here too")
	eventsOut    = flag.String("events", "", "append the begin and end of each call to this file, in Unix nanoseconds")
	label        = flag.String("label", "", "name of the runtime in the results")
	floorConf    = flag.String("floor-conf-dir", "/etc/cni/net.d", "folder of the network of the floor suite")
	floorNet     = flag.String("floor-net", "bench", "name of that network")
	floorPlugins = flag.String("floor-plugins", "/usr/lib/cni:/opt/cni/bin", "folders of its plugins")
	floorCrun    = flag.String("floor-crun", "/usr/bin/crun", "the OCI runtime of the floor suite")
	floorRootfs  = flag.String("floor-rootfs", "", "a root file system for it, with sh, sleep and true")
	floorSeccomp = flag.String("floor-seccomp", "", "file with the seccomp section of its containers' config.json")
	recordN      = flag.Int("records", 1000, "containers on record of the records suite")
	recordLists  = flag.Int("record-lists", 200, "calls of each list of the records suite")
	streamMB     = flag.Int("stream-mb", 500, "MB of each stream of the stream suite")
	streamN      = flag.Int("stream-n", 3, "streams of the stream suite, over each protocol")
	logLines     = flag.Int("log-lines", 300000, "lines of the logs suite")
	logN         = flag.Int("log-n", 3, "containers of the logs suite, one after the other")
)

type row struct {
	Suite, Scenario, Op string
	N                   int
	P50, P95, P99       float64 // milliseconds unless Unit says otherwise
	Min, Max            float64
	Unit                string
}

var (
	rows []row
	rt   cri.RuntimeServiceClient
	im   cri.ImageServiceClient
	seq  atomic.Int64
	run  = strconv.FormatInt(time.Now().UnixNano(), 36)
)

func die(f string, a ...any) { fmt.Fprintf(os.Stderr, "cribench: "+f+"\n", a...); os.Exit(1) }

func quantile(s []float64, q float64) float64 {
	if len(s) == 0 {
		return 0
	}
	i := int(q*float64(len(s)-1) + 0.5)
	return s[i]
}

func add(suite, scenario, op, unit string, v []float64) {
	if len(v) == 0 {
		return
	}
	s := append([]float64(nil), v...)
	sort.Float64s(s)
	r := row{suite, scenario, op, len(s), quantile(s, .5), quantile(s, .95), quantile(s, .99), s[0], s[len(s)-1], unit}
	rows = append(rows, r)
	fmt.Printf("%-10s %-14s %-26s n=%-4d p50=%10.2f p95=%10.2f min=%10.2f max=%10.2f %s\n",
		r.Suite, r.Scenario, r.Op, r.N, r.P50, r.P95, r.Min, r.Max, r.Unit)
}

type samples struct {
	sync.Mutex
	m     map[string][]float64
	order []string
}

func (s *samples) put(op string, ms float64) {
	s.Lock()
	defer s.Unlock()
	if s.m == nil {
		s.m = map[string][]float64{}
	}
	if _, ok := s.m[op]; !ok {
		s.order = append(s.order, op)
	}
	s.m[op] = append(s.m[op], ms)
}

func (s *samples) time(op string, f func() error) error {
	t := time.Now()
	err := f()
	if err != nil {
		return fmt.Errorf("%s: %w", op, err)
	}
	took := time.Since(t)
	s.put(op, ms(took))
	return event(op, t, took)
}

// event appends a call to the file of --events: when it began and ended, in Unix nanoseconds, and its name.
func event(op string, begun time.Time, took time.Duration) error {
	if *eventsOut == "" {
		return nil
	}
	f, err := os.OpenFile(*eventsOut, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = fmt.Fprintln(f, begun.UnixNano(), begun.Add(took).UnixNano(), op)
	return err
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

func cpuMS() float64 {
	if *cpuDir == "" {
		return -1
	}
	if b, err := os.ReadFile(filepath.Join(*cpuDir, "cpuacct.usage")); err == nil {
		n, _ := strconv.ParseFloat(strings.TrimSpace(string(b)), 64)
		return n / 1e6
	}
	b, err := os.ReadFile(filepath.Join(*cpuDir, "cpu.stat"))
	if err != nil {
		return -1
	}
	for _, l := range strings.Split(string(b), "\n") {
		if f := strings.Fields(l); len(f) == 2 && f[0] == "usage_usec" {
			n, _ := strconv.ParseFloat(f[1], 64)
			return n / 1e3
		}
	}
	return -1
}

// pss returns the proportional and the resident set size of a process in KiB.
func pss(pid string) (p, r float64) {
	b, err := os.ReadFile("/proc/" + pid + "/smaps_rollup")
	if err != nil {
		return
	}
	for _, l := range strings.Split(string(b), "\n") {
		f := strings.Fields(l)
		if len(f) < 2 {
			continue
		}
		n, _ := strconv.ParseFloat(f[1], 64)
		switch f[0] {
		case "Pss:":
			p = n
		case "Rss:":
			r = n
		}
	}
	return
}

type mem struct {
	daemonPSS, daemonRSS, helpersPSS, avail float64
	helpers                                 map[string]int
	helperPSS                               map[string]float64
}

func memory() (m mem) {
	m.helpers, m.helperPSS = map[string]int{}, map[string]float64{}
	if *pidFile != "" {
		if b, err := os.ReadFile(*pidFile); err == nil {
			m.daemonPSS, m.daemonRSS = pss(strings.TrimSpace(string(b)))
		}
	}
	ents, _ := filepath.Glob("/proc/[0-9]*/comm")
	for _, e := range ents {
		b, err := os.ReadFile(e)
		if err != nil {
			continue
		}
		name := strings.TrimSpace(string(b))
		for _, c := range strings.Split(*comms, ",") {
			if c != "" && strings.HasPrefix(name, c) {
				p, _ := pss(filepath.Base(filepath.Dir(e)))
				m.helpersPSS += p
				m.helperPSS[c] += p
				m.helpers[c]++
			}
		}
	}
	if b, err := os.ReadFile("/proc/meminfo"); err == nil {
		for _, l := range strings.Split(string(b), "\n") {
			if f := strings.Fields(l); len(f) > 1 && f[0] == "MemAvailable:" {
				m.avail, _ = strconv.ParseFloat(f[1], 64)
			}
		}
	}
	return
}

func podConfig(net string) *cri.PodSandboxConfig {
	n := seq.Add(1)
	name := fmt.Sprintf("bench-%s-%d", run, n)
	c := &cri.PodSandboxConfig{
		Metadata:     &cri.PodSandboxMetadata{Name: name, Uid: name, Namespace: "cribench", Attempt: 0},
		Hostname:     fmt.Sprintf("b%d", n),
		LogDirectory: filepath.Join(*logRoot, name),
		DnsConfig:    &cri.DNSConfig{Servers: []string{"127.0.0.1"}},
		Labels:       map[string]string{"cribench": run},
		Linux: &cri.LinuxPodSandboxConfig{CgroupParent: *parent, SecurityContext: &cri.LinuxSandboxSecurityContext{
			NamespaceOptions: &cri.NamespaceOption{Network: cri.NamespaceMode_POD, Pid: cri.NamespaceMode_CONTAINER},
			Seccomp:          &cri.SecurityProfile{ProfileType: cri.SecurityProfile_RuntimeDefault}}},
	}
	if net == "host" {
		c.Linux.SecurityContext.NamespaceOptions.Network = cri.NamespaceMode_NODE
		c.Hostname = ""
	}
	return c
}

func ctrConfig(p *cri.PodSandboxConfig) *cri.ContainerConfig {
	return &cri.ContainerConfig{
		Metadata: &cri.ContainerMetadata{Name: "c", Attempt: 0},
		Image:    &cri.ImageSpec{Image: *image, UserSpecifiedImage: *image},
		// obeys SIGTERM, so StopContainer measures the runtime and not the grace period
		Command: []string{"sh", "-c", "trap 'exit 0' TERM; echo ready; while :; do sleep 3600 & wait $!; done"},
		Labels:  p.Labels,
		LogPath: "c.log",
		Linux: &cri.LinuxContainerConfig{
			Resources: &cri.LinuxContainerResources{CpuShares: 2, MemoryLimitInBytes: 64 << 20},
			SecurityContext: &cri.LinuxContainerSecurityContext{
				NamespaceOptions: p.Linux.SecurityContext.NamespaceOptions,
				Seccomp:          p.Linux.SecurityContext.Seccomp}},
	}
}

func isRunning(ctx context.Context, id string) error {
	for i := 0; ; i++ {
		st, err := rt.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: id})
		if err != nil {
			return err
		}
		if st.Status.State == cri.ContainerState_CONTAINER_RUNNING {
			return nil
		}
		if st.Status.State == cri.ContainerState_CONTAINER_EXITED || i > 20000 {
			return fmt.Errorf("container %s: %s (%s)", id, st.Status.State, st.Status.Reason)
		}
		time.Sleep(time.Millisecond)
	}
}

// up makes a pod with one running container.
func up(ctx context.Context, s *samples, net string) (pod, ctr string, err error) {
	t0 := time.Now()
	p := podConfig(net)
	if err = os.MkdirAll(p.LogDirectory, 0o755); err != nil {
		return
	}
	if err = s.time("RunPodSandbox", func() error {
		r, e := rt.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: p, RuntimeHandler: *handler})
		if e == nil {
			pod = r.PodSandboxId
		}
		return e
	}); err != nil {
		return
	}
	if err = s.time("CreateContainer", func() error {
		r, e := rt.CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: pod, Config: ctrConfig(p), SandboxConfig: p})
		if e == nil {
			ctr = r.ContainerId
		}
		return e
	}); err != nil {
		return
	}
	t1 := time.Now()
	if err = s.time("StartContainer", func() error {
		_, e := rt.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: ctr})
		return e
	}); err != nil {
		return
	}
	if err = isRunning(ctx, ctr); err != nil {
		return
	}
	s.put("Start to RUNNING", ms(time.Since(t1)))
	s.put("pod+container to RUNNING", ms(time.Since(t0)))
	// the workload has set its SIGTERM trap once it has written a line; else StopContainer could wait the whole grace period
	log := filepath.Join(p.LogDirectory, "c.log")
	for i := 0; ; i++ {
		if b, _ := os.ReadFile(log); strings.Contains(string(b), "ready") {
			break
		}
		if i > 15000 {
			err = fmt.Errorf("no log line of container %s in %s", ctr, log)
			return
		}
		time.Sleep(2 * time.Millisecond)
	}
	s.put("Start to first log line", ms(time.Since(t1)))
	return
}

func down(ctx context.Context, s *samples, pod, ctr string) error {
	t0 := time.Now()
	if err := s.time("StopContainer", func() error {
		_, e := rt.StopContainer(ctx, &cri.StopContainerRequest{ContainerId: ctr, Timeout: 10})
		return e
	}); err != nil {
		return err
	}
	if err := s.time("RemoveContainer", func() error {
		_, e := rt.RemoveContainer(ctx, &cri.RemoveContainerRequest{ContainerId: ctr})
		return e
	}); err != nil {
		return err
	}
	if err := s.time("StopPodSandbox", func() error {
		_, e := rt.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: pod})
		return e
	}); err != nil {
		return err
	}
	if err := s.time("RemovePodSandbox", func() error {
		_, e := rt.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: pod})
		return e
	}); err != nil {
		return err
	}
	s.put("whole teardown", ms(time.Since(t0)))
	return nil
}

// each calls f for 0..n-1 with at most c at once and returns the first error.
func each(n, c int, f func(i int) error) error {
	var wg sync.WaitGroup
	var once sync.Once
	var first error
	next := atomic.Int64{}
	for w := 0; w < c; w++ {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for {
				i := int(next.Add(1)) - 1
				if i >= n {
					return
				}
				if err := f(i); err != nil {
					once.Do(func() { first = err })
					return
				}
			}
		}()
	}
	wg.Wait()
	return first
}

func lifecycle(ctx context.Context) error {
	for _, net := range strings.Split(*nets, ",") {
		for _, cs := range strings.Split(*concs, ",") {
			c, _ := strconv.Atoi(cs)
			if c < 1 {
				c = 1
			}
			s, cpu, t := &samples{}, cpuMS(), time.Now()
			err := each(*num, c, func(int) error {
				p, k, err := up(ctx, s, net)
				if err != nil {
					return err
				}
				return down(ctx, s, p, k)
			})
			wall := time.Since(t).Seconds()
			sc := fmt.Sprintf("%s c=%d", net, c)
			for _, op := range s.order {
				add("lifecycle", sc, op, "ms", s.m[op])
			}
			if err != nil {
				return err
			}
			add("lifecycle", sc, "throughput", "pods/s", []float64{float64(*num) / wall})
			if cpu >= 0 {
				add("lifecycle", sc, "CPU per pod life", "cpu-ms", []float64{(cpuMS() - cpu) / float64(*num)})
			}
		}
	}
	return nil
}

func execSuite(ctx context.Context) error {
	p, k, err := up(ctx, &samples{}, "bridge")
	if err != nil {
		return err
	}
	for _, c := range []int{1, 4} {
		s, cpu := &samples{}, cpuMS()
		err = each(*execs, c, func(int) error { return oneExec(ctx, s, k) })
		for _, op := range s.order {
			add("exec", fmt.Sprintf("c=%d", c), op, "ms", s.m[op])
		}
		if err != nil {
			return err
		}
		if cpu >= 0 {
			add("exec", fmt.Sprintf("c=%d", c), "CPU per exec", "cpu-ms", []float64{(cpuMS() - cpu) / float64(*execs)})
		}
	}
	return down(ctx, &samples{}, p, k)
}

func oneExec(ctx context.Context, s *samples, k string) error {
	return s.time("ExecSync true", func() error {
		r, e := rt.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: k, Cmd: []string{"true"}, Timeout: 20})
		if e == nil && r.ExitCode != 0 {
			e = fmt.Errorf("exit %d", r.ExitCode)
		}
		return e
	})
}

func reportMem(sc string, m mem) {
	if m.daemonPSS > 0 {
		add("memory", sc, "daemon PSS", "MiB", []float64{m.daemonPSS / 1024})
		add("memory", sc, "daemon RSS", "MiB", []float64{m.daemonRSS / 1024})
	}
	for c, n := range m.helpers {
		add("memory", sc, fmt.Sprintf("%s x%d PSS", c, n), "MiB", []float64{m.helperPSS[c] / 1024})
	}
}

func density(ctx context.Context) error {
	time.Sleep(2 * time.Second)
	m0 := memory()
	reportMem("0 pods", m0)
	type pc struct{ p, c string }
	all := make([]pc, *pods)
	s, cpu, t := &samples{}, cpuMS(), time.Now()
	err := each(*pods, *par, func(i int) (err error) {
		all[i].p, all[i].c, err = up(ctx, s, *densityNet)
		return
	})
	sc := fmt.Sprintf("%d pods c=%d", *pods, *par)
	if err == nil {
		add("density", sc, "all RUNNING", "s", []float64{time.Since(t).Seconds()})
		if cpu >= 0 {
			add("density", sc, "CPU per pod start", "cpu-ms", []float64{(cpuMS() - cpu) / float64(*pods)})
		}
		for _, op := range s.order {
			add("density", sc, op, "ms", s.m[op])
		}
		time.Sleep(3 * time.Second)
		m1 := memory()
		reportMem(sc, m1)
		n := float64(*pods)
		add("memory", sc, "helpers PSS per pod", "KiB", []float64{(m1.helpersPSS - m0.helpersPSS) / n})
		add("memory", sc, "daemon PSS growth per pod", "KiB", []float64{(m1.daemonPSS - m0.daemonPSS) / n})
		add("memory", sc, "MemAvailable drop per pod", "KiB", []float64{(m0.avail - m1.avail) / n})
		l := &samples{}
		for i := 0; i < *lists && err == nil; i++ {
			err = listAll(ctx, l, all[i%len(all)].p, all[i%len(all)].c)
		}
		for i := 0; i < *lists && err == nil; i++ {
			err = oneExec(ctx, l, all[i%len(all)].c)
		}
		for _, op := range l.order {
			add("density", sc, op, "ms", l.m[op])
		}
		if err == nil && cpu >= 0 {
			c0, t0 := cpuMS(), time.Now()
			time.Sleep(10 * time.Second)
			add("density", sc, "CPU while idle", "cpu-ms/s", []float64{(cpuMS() - c0) / time.Since(t0).Seconds()})
		}
		if err == nil && *restartCmd != "" {
			err = restarts(ctx, sc)
			time.Sleep(3 * time.Second)
			reportMem(sc+" restarted", memory())
		}
	}
	d := &samples{}
	t = time.Now()
	err2 := each(*pods, *par, func(i int) error {
		if all[i].p == "" || all[i].c == "" {
			if all[i].p != "" {
				rt.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: all[i].p})
				rt.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: all[i].p})
			}
			return nil
		}
		return down(ctx, d, all[i].p, all[i].c)
	})
	if err == nil {
		add("density", sc, "all removed", "s", []float64{time.Since(t).Seconds()})
		time.Sleep(3 * time.Second)
		reportMem("after", memory())
		err = err2
	}
	return err
}

func listAll(ctx context.Context, l *samples, pod, ctr string) error {
	for _, c := range []struct {
		op string
		f  func() error
	}{
		{"Version", func() error { _, e := rt.Version(ctx, &cri.VersionRequest{}); return e }},
		{"Status", func() error { _, e := rt.Status(ctx, &cri.StatusRequest{}); return e }},
		{"ListPodSandbox", func() error { _, e := rt.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{}); return e }},
		{"ListContainers", func() error { _, e := rt.ListContainers(ctx, &cri.ListContainersRequest{}); return e }},
		{"ListContainerStats", func() error { _, e := rt.ListContainerStats(ctx, &cri.ListContainerStatsRequest{}); return e }},
		{"ListPodSandboxStats", func() error { _, e := rt.ListPodSandboxStats(ctx, &cri.ListPodSandboxStatsRequest{}); return e }},
		{"PodSandboxStatus", func() error {
			_, e := rt.PodSandboxStatus(ctx, &cri.PodSandboxStatusRequest{PodSandboxId: pod})
			return e
		}},
		{"ContainerStatus", func() error {
			_, e := rt.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: ctr})
			return e
		}},
		{"ListImages", func() error { _, e := im.ListImages(ctx, &cri.ListImagesRequest{}); return e }},
	} {
		if err := l.time(c.op, c.f); err != nil {
			if c.op == "ListPodSandboxStats" {
				l.put("ListPodSandboxStats failed", 0)
				continue
			}
			return err
		}
	}
	return nil
}

func restarts(ctx context.Context, sc string) error {
	want, err := rt.ListContainers(ctx, &cri.ListContainersRequest{})
	if err != nil {
		return err
	}
	var v []float64
	for i := 0; i < *restartN; i++ {
		t := time.Now()
		if out, err := exec.Command("sh", "-c", *restartCmd).CombinedOutput(); err != nil {
			return fmt.Errorf("restart: %w: %s", err, out)
		}
		for {
			c, done := context.WithTimeout(ctx, 2*time.Second)
			conn := dial(*endpoint)
			r := cri.NewRuntimeServiceClient(conn)
			_, e := r.Version(c, &cri.VersionRequest{})
			var l *cri.ListContainersResponse
			if e == nil {
				l, e = r.ListContainers(c, &cri.ListContainersRequest{})
			}
			done()
			conn.Close()
			if e == nil && len(l.Containers) == len(want.Containers) {
				up := 0
				for _, k := range l.Containers {
					if k.State == cri.ContainerState_CONTAINER_RUNNING {
						up++
					}
				}
				if up < *pods {
					return fmt.Errorf("after the restart only %d containers run", up)
				}
				break
			}
			if time.Since(t) > 2*time.Minute {
				return fmt.Errorf("no answer two minutes after the restart: %v", e)
			}
			time.Sleep(5 * time.Millisecond)
		}
		v = append(v, ms(time.Since(t)))
		time.Sleep(2 * time.Second)
	}
	add("density", sc, "kill -9 to answering", "ms", v)
	// the first connection reconnects by itself
	for i := 0; i < 100; i++ {
		if _, err = rt.Version(ctx, &cri.VersionRequest{}); err == nil {
			return nil
		}
		time.Sleep(100 * time.Millisecond)
	}
	return err
}

func manifestBytes(u string) (sum float64) {
	q, _ := http.NewRequest("GET", u, nil)
	q.Header.Set("Accept", "application/vnd.docker.distribution.manifest.v2+json, application/vnd.oci.image.manifest.v1+json")
	r, err := http.DefaultClient.Do(q)
	if err != nil {
		die("%s: %v", u, err)
	}
	defer r.Body.Close()
	b, _ := io.ReadAll(r.Body)
	var m struct{ Layers []struct{ Size float64 } }
	json.Unmarshal(b, &m)
	for _, l := range m.Layers {
		sum += l.Size
	}
	return
}

func pull(ctx context.Context) error {
	if *pullImage == "" {
		return nil
	}
	spec := &cri.ImageSpec{Image: *pullImage}
	s, bytes := &samples{}, 0.0
	if *pullURL != "" {
		bytes = manifestBytes(*pullURL)
	}
	var rate, cpus []float64
	for i := 0; i < *pullN; i++ {
		im.RemoveImage(ctx, &cri.RemoveImageRequest{Image: spec})
		time.Sleep(time.Second)
		t, cpu := time.Now(), cpuMS()
		if err := s.time("PullImage", func() error {
			_, e := im.PullImage(ctx, &cri.PullImageRequest{Image: spec})
			return e
		}); err != nil {
			return err
		}
		if bytes > 0 {
			rate = append(rate, bytes/1e6/time.Since(t).Seconds())
		}
		if cpu >= 0 {
			cpus = append(cpus, cpuMS()-cpu)
		}
	}
	if err := s.time("RemoveImage", func() error { _, e := im.RemoveImage(ctx, &cri.RemoveImageRequest{Image: spec}); return e }); err != nil {
		return err
	}
	sc := fmt.Sprintf("%.0f MB", bytes/1e6)
	for _, op := range s.order {
		add("pull", sc, op, "ms", s.m[op])
	}
	add("pull", sc, "compressed rate", "MB/s", rate)
	add("pull", sc, "CPU per pull", "cpu-ms", cpus)
	return nil
}

func idle(ctx context.Context) error {
	time.Sleep(2 * time.Second)
	reportMem("idle", memory())
	return nil
}

func dial(e string) *grpc.ClientConn {
	if strings.HasPrefix(e, "/") {
		e = "unix://" + e
	}
	c, err := grpc.NewClient(e, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20)))
	if err != nil {
		die("%s: %v", e, err)
	}
	return c
}

func main() {
	flag.Parse()
	if *suites == "floor" {
		if err := floor(context.Background()); err != nil {
			die("floor: %v", err)
		}
		writeJSON("", "")
		return
	}
	conn := dial(*endpoint)
	rt = cri.NewRuntimeServiceClient(conn)
	im = cri.NewImageServiceClient(conn)
	if *imgEndpoint != "" {
		im = cri.NewImageServiceClient(dial(*imgEndpoint))
	}
	ctx := context.Background()
	v, err := rt.Version(ctx, &cri.VersionRequest{})
	if err != nil {
		die("Version: %v", err)
	}
	load, _ := os.ReadFile("/proc/loadavg")
	fmt.Printf("# %s %s %s handler=%q load=%s\n", *label, v.RuntimeName, v.RuntimeVersion, *handler, strings.TrimSpace(string(load)))
	if _, err := im.PullImage(ctx, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: *image}}); err != nil {
		die("pull %s: %v", *image, err)
	}
	fail := false
	for _, s := range strings.Split(*suites, ",") {
		f := map[string]func(context.Context) error{"lifecycle": lifecycle, "exec": execSuite, "density": density, "pull": pull, "idle": idle,
			"records": records, "stream": stream, "logs": logs}[s]
		if f == nil {
			die("no suite %q", s)
		}
		if err := f(ctx); err != nil {
			fmt.Fprintf(os.Stderr, "cribench: %s: %v\n", s, err)
			fail = true
		}
	}
	load, _ = os.ReadFile("/proc/loadavg")
	fmt.Printf("# end load=%s\n", strings.TrimSpace(string(load)))
	writeJSON(v.RuntimeName, v.RuntimeVersion)
	os.RemoveAll(*logRoot)
	if fail {
		os.Exit(1)
	}
}

func writeJSON(name, version string) {
	if *jsonOut == "" {
		return
	}
	b, _ := json.MarshalIndent(map[string]any{"label": *label, "runtime": name, "version": version, "handler": *handler, "rows": rows}, "", " ")
	if err := os.WriteFile(*jsonOut, b, 0o644); err != nil {
		die("%v", err)
	}
}
