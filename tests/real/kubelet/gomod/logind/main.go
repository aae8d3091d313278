// The part of systemd-logind that a kubelet uses to end its pods before the node goes down: an inhibitor, and the signal
// PrepareForShutdown, which SIGUSR1 sends here. Says on stdout when inhibitors are taken and released. The bus is the one that
// DBUS_SYSTEM_BUS_ADDRESS names.
package main

import (
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/godbus/dbus/v5"
	"github.com/godbus/dbus/v5/prop"
)

const (
	path  = dbus.ObjectPath("/org/freedesktop/login1")
	iface = "org.freedesktop.login1.Manager"
)

type manager struct{}

// Inhibit hands out the writing end of a pipe; whoever closes it has let go.
func (manager) Inhibit(what, who, why, mode string) (dbus.UnixFD, *dbus.Error) {
	r, w, err := os.Pipe()
	if err != nil {
		return 0, dbus.MakeFailedError(err)
	}
	fmt.Println("inhibited by", who, what, mode)
	go func() {
		_, _ = r.Read(make([]byte, 1))
		fmt.Println("released by", who)
		r.Close()
	}()
	// Duplicated by the bus when it is sent; ours must go, or the end is never seen.
	fd, err := syscall.Dup(int(w.Fd()))
	w.Close()
	if err != nil {
		return 0, dbus.MakeFailedError(err)
	}
	sent <- fd
	return dbus.UnixFD(fd), nil
}

var sent = make(chan int, 16)

func main() {
	bus, err := dbus.ConnectSystemBus()
	fail(err)
	fail(bus.Export(manager{}, path, iface))
	_, err = prop.Export(bus, path, prop.Map{iface: {"InhibitDelayMaxUSec": {Value: uint64(600_000_000)}}})
	fail(err)
	reply, err := bus.RequestName("org.freedesktop.login1", dbus.NameFlagDoNotQueue)
	fail(err)
	if reply != dbus.RequestNameReplyPrimaryOwner {
		fail(fmt.Errorf("the name is taken"))
	}
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGUSR1, syscall.SIGUSR2)
	fmt.Println("here")
	for s := range signals {
		// What was handed out before has long been sent: nobody but the receiver holds it from here on.
		for len(sent) > 0 {
			syscall.Close(<-sent)
		}
		fail(bus.Emit(path, iface+".PrepareForShutdown", s == syscall.SIGUSR1))
		fmt.Println("said")
	}
}

func fail(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "logind:", err)
		os.Exit(2)
	}
}
