// What the tests' pods do and busybox can't: a gRPC health service, memory that is really used, and numbered log lines at
// a chosen rate. It is the one program of the image registry.k8s.io/lxcri/podtool.
package main

import (
	"fmt"
	"net"
	"os"
	"strconv"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
)

func fail(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "podtool:", err)
		os.Exit(2)
	}
}

func number(i int) int {
	if len(os.Args) <= i {
		fail(fmt.Errorf("argument %d is missing", i))
	}
	n, err := strconv.Atoi(os.Args[i])
	fail(err)
	return n
}

// Serves the health service on a port; the file /tmp/sick makes it answer NOT_SERVING.
func grpcHealth(port int) {
	listener, err := net.Listen("tcp", fmt.Sprintf(":%d", port))
	fail(err)
	server, state := grpc.NewServer(), health.NewServer()
	grpc_health_v1.RegisterHealthServer(server, state)
	go func() {
		for {
			status := grpc_health_v1.HealthCheckResponse_SERVING
			if _, err := os.Stat("/tmp/sick"); err == nil {
				status = grpc_health_v1.HealthCheckResponse_NOT_SERVING
			}
			state.SetServingStatus("", status)
			time.Sleep(100 * time.Millisecond)
		}
	}()
	fail(server.Serve(listener))
}

// Takes so many MiB, one after the other, and keeps them.
func eat(mib int) {
	var kept [][]byte
	for i := 0; i < mib; i++ {
		block := make([]byte, 1<<20)
		for at := 0; at < len(block); at += 4096 {
			block[at] = byte(i)
		}
		kept = append(kept, block)
	}
	fmt.Println("eaten", len(kept))
	time.Sleep(time.Hour)
}

// Writes so many numbered lines of 100 bytes, so many a second, then waits to be ended.
func lines(count, rate int) {
	start := time.Now()
	for i := 0; i < count; i++ {
		fmt.Printf("line %08d %085d\n", i, 0)
		if ahead := time.Duration(i)*time.Second/time.Duration(rate) - time.Since(start); ahead > 5*time.Millisecond {
			time.Sleep(ahead)
		}
	}
	time.Sleep(time.Hour)
}

func main() {
	if len(os.Args) < 2 {
		fail(fmt.Errorf("usage: podtool grpc PORT | eat MIB | lines COUNT RATE"))
	}
	switch os.Args[1] {
	case "grpc":
		grpcHealth(number(2))
	case "eat":
		eat(number(2))
	case "lines":
		lines(number(2), number(3))
	default:
		fail(fmt.Errorf("unknown verb %q", os.Args[1]))
	}
}
