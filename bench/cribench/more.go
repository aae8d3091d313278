package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"net/url"

	restclient "k8s.io/client-go/rest"
	"k8s.io/client-go/tools/remotecommand"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// records measures the lists beside many containers on record: pods of a hundred containers each, made and not started.
func records(ctx context.Context) error {
	const each = 100
	var made []string
	defer func() {
		for _, p := range made {
			rt.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: p})
			rt.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: p})
		}
	}()
	for n := 0; n < *recordN; {
		p := podConfig("host")
		if err := os.MkdirAll(p.LogDirectory, 0o755); err != nil {
			return err
		}
		r, err := rt.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: p, RuntimeHandler: *handler})
		if err != nil {
			return err
		}
		made = append(made, r.PodSandboxId)
		for i := 0; i < each && n < *recordN; i++ {
			c := ctrConfig(p)
			c.Metadata.Name = fmt.Sprintf("c%d", i)
			c.LogPath = c.Metadata.Name + ".log"
			if _, err := rt.CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: r.PodSandboxId, Config: c, SandboxConfig: p}); err != nil {
				return err
			}
			n++
		}
	}
	l := &samples{}
	for i := 0; i < *recordLists; i++ {
		if err := l.time("ListContainers", func() error {
			r, e := rt.ListContainers(ctx, &cri.ListContainersRequest{})
			if e == nil && len(r.Containers) < *recordN {
				e = fmt.Errorf("%d containers", len(r.Containers))
			}
			return e
		}); err != nil {
			return err
		}
		if err := l.time("ListPodSandbox", func() error { _, e := rt.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{}); return e }); err != nil {
			return err
		}
	}
	for _, op := range l.order {
		add("records", fmt.Sprintf("%d containers", *recordN), op, "ms", l.m[op])
	}
	return nil
}

// zeros is a reader of that many bytes, which remembers when it was first read.
type zeros struct {
	left  int64
	begun time.Time
}

func (z *zeros) Read(b []byte) (int, error) {
	if z.begun.IsZero() {
		z.begun = time.Now()
	}
	if z.left == 0 {
		return 0, io.EOF
	}
	if int64(len(b)) > z.left {
		b = b[:z.left]
	}
	z.left -= int64(len(b))
	return len(b), nil
}

type counter int64

func (c *counter) Write(b []byte) (int, error) { *c += counter(len(b)); return len(b), nil }

// stream measures the rate of an exec whose stdin goes to its stdout, over both protocols that there are.
func stream(ctx context.Context) error {
	p, k, err := up(ctx, &samples{}, "bridge")
	if err != nil {
		return err
	}
	for _, proto := range []string{"spdy", "websocket"} {
		s := &samples{}
		cpu := cpuMS()
		for i := 0; i < *streamN; i++ {
			rate, err := oneStream(ctx, k, proto)
			if err != nil {
				fmt.Fprintf(os.Stderr, "cribench: stream: %s: %v\n", proto, err)
				break
			}
			s.put("stdin to stdout", rate)
		}
		add("stream", proto, "stdin to stdout", "MB/s", s.m["stdin to stdout"])
		if n := len(s.m["stdin to stdout"]); n > 0 && cpu >= 0 {
			add("stream", proto, "CPU per GB", "cpu-ms", []float64{(cpuMS() - cpu) / float64(n) / (float64(*streamMB) / 1000)})
		}
	}
	return down(ctx, &samples{}, p, k)
}

func oneStream(ctx context.Context, k, proto string) (float64, error) {
	r, err := rt.Exec(ctx, &cri.ExecRequest{ContainerId: k, Cmd: []string{"cat"}, Stdin: true, Stdout: true})
	if err != nil {
		return 0, err
	}
	u, err := url.Parse(r.Url)
	if err != nil {
		return 0, err
	}
	var e remotecommand.Executor
	if proto == "spdy" {
		e, err = remotecommand.NewSPDYExecutor(&restclient.Config{}, "POST", u)
	} else {
		e, err = remotecommand.NewWebSocketExecutor(&restclient.Config{}, "GET", u.String())
	}
	if err != nil {
		return 0, err
	}
	in, out := &zeros{left: int64(*streamMB) * 1e6}, new(counter)
	c, done := context.WithTimeout(ctx, 2*time.Minute)
	defer done()
	if err := e.StreamWithContext(c, remotecommand.StreamOptions{Stdin: in, Stdout: out}); err != nil {
		return 0, err
	}
	if int64(*out) != int64(*streamMB)*1e6 {
		return 0, fmt.Errorf("%d bytes came back of %d MB", *out, *streamMB)
	}
	return float64(*streamMB) / time.Since(in.begun).Seconds(), nil
}

// logLine is what follows its number in each line of the logs suite.
const logLine = " a line of a log, as long as they are"

// logWriter is the command that writes the lines.
func logWriter() []string {
	return []string{"awk", fmt.Sprintf(`BEGIN { for (i = 1; i <= %d; i++) { print i "%s"; fflush() } }`, *logLines, logLine)}
}

// logs measures how fast lines that are written one at a time get into the log, and that all of them do.
func logs(ctx context.Context) error {
	var rates, cpus []float64
	for i := 0; i < *logN; i++ {
		rate, cpu, err := oneLog(ctx)
		if err != nil {
			return err
		}
		rates, cpus = append(rates, rate), append(cpus, cpu)
	}
	sc := fmt.Sprintf("%d lines", *logLines)
	add("logs", sc, "lines", "lines/s", rates)
	add("logs", sc, "CPU per million lines", "cpu-ms", cpus)
	return nil
}

func oneLog(ctx context.Context) (rate, cpu float64, err error) {
	p := podConfig("host")
	if err = os.MkdirAll(p.LogDirectory, 0o755); err != nil {
		return
	}
	r, err := rt.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: p, RuntimeHandler: *handler})
	if err != nil {
		return
	}
	defer func() {
		rt.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: r.PodSandboxId})
		rt.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: r.PodSandboxId})
	}()
	c := ctrConfig(p)
	c.Command = logWriter()
	k, err := rt.CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: r.PodSandboxId, Config: c, SandboxConfig: p})
	if err != nil {
		return
	}
	before, t := cpuMS(), time.Now()
	if _, err = rt.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: k.ContainerId}); err != nil {
		return
	}
	path := filepath.Join(p.LogDirectory, "c.log")
	for end := time.Now().Add(3 * time.Minute); !endsWith(path, strconv.Itoa(*logLines)+logLine); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			return 0, 0, fmt.Errorf("the last of %d lines did not come", *logLines)
		}
	}
	took := time.Since(t)
	cpu = (cpuMS() - before) * 1e6 / float64(*logLines)
	f, err := os.Open(path)
	if err != nil {
		return
	}
	defer f.Close()
	n, whole, lines := 0, "", bufio.NewScanner(f)
	for lines.Scan() {
		// TIME STREAM TAG CONTENT; P is the beginning of a line
		w := strings.SplitN(lines.Text(), " ", 4)
		if len(w) < 4 {
			return 0, 0, fmt.Errorf("in the log after line %d: %q", n, lines.Text())
		}
		whole += w[3]
		if w[2] == "P" {
			continue
		}
		n++
		if whole != strconv.Itoa(n)+logLine {
			return 0, 0, fmt.Errorf("line %d of the log is %q", n, whole)
		}
		whole = ""
	}
	return float64(*logLines) / took.Seconds(), cpu, lines.Err()
}

// endsWith says whether the log ends with that line, which may be in two pieces.
func endsWith(path, line string) bool {
	f, err := os.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	end, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return false
	}
	b := make([]byte, min(end, 512))
	if _, err := f.ReadAt(b, end-int64(len(b))); err != nil {
		return false
	}
	whole := ""
	for _, l := range strings.Split(string(b), "\n") {
		if w := strings.SplitN(l, " ", 4); len(w) == 4 && w[2] == "P" {
			whole += w[3]
		} else if len(w) == 4 {
			whole += w[3] + "\n"
		}
	}
	return bytes.HasSuffix(b, []byte("\n")) && strings.HasSuffix(whole, line+"\n")
}
