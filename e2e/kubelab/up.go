package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"k8s.io/client-go/kubernetes"
)

type upOptions struct {
	host         string
	port         int
	withNode     bool
	detach       bool
	node         node
	kwok         string
	controlPlane controlPlane
}

const upHelp = `Start a Kubernetes and keep it running until SIGINT, SIGTERM or "kubelab down".

Without --node it is a control plane (etcd, kube-apiserver, kube-controller-manager, kube-scheduler)
on a free loopback port. It needs no root, and any number of them run side by side, each with its own
--dir. With --node this machine joins as a real node: containerd, runc and the CNI plugins of Debian,
kubelet, kube-proxy (nftables) and CoreDNS, all of it inside the state folder. One node a machine.

There are no GPUs in a lab. --gpus makes the real node advertise nvidia.com/gpu and the labels of GPU
feature discovery, so that scheduling can be tried with real containers; no device is behind them.
Simulated nodes ("kubelab simulate") advertise the same, and pods on them do not even run.

Components that die are started again, at most 5 times a minute. Client limits of controller-manager
and scheduler: ` + clientLimits + `.`

func upCommand(dir *string) *cobra.Command {
	o := &upOptions{}
	c := &cobra.Command{
		Use: "up", Short: "start a Kubernetes on this machine", Long: upHelp, Args: cobra.NoArgs,
		Example: "  kubelab up --dir .lab --detach\n  sudo kubelab up --dir .lab --node --gpus 4 --detach",
		RunE:    func(*cobra.Command, []string) error { return o.run(*dir) },
	}
	f := c.Flags()
	f.BoolVar(&o.detach, "detach", false, "return when the lab is ready and leave it running")
	f.BoolVar(&o.withNode, "node", false, "make this machine a real node (root, Debian)")
	f.StringVar(&o.host, "host", "127.0.0.1", "address of the API server; with --node it is the bridge's")
	f.IntVar(&o.port, "port", 0, "port of the API server; 0 is any free one")
	f.StringVar(&o.kwok, "kwok", "", "KWOK, which plays the simulated nodes; default: kwok beside kubelab or in $PATH")
	f.StringVar(&o.controlPlane.featureGates, "feature-gates", "", "passed to API server, controller-manager and scheduler")
	f.StringVar(&o.controlPlane.runtimeConfig, "runtime-config", "", "passed to the API server")
	f.BoolVar(&o.controlPlane.audit, "audit", false, "the API server logs who wrote what, as the administrator or in another's name, to audit.log in the state folder")
	f.DurationVar(&o.controlPlane.hpaInterval, "hpa-interval", 2*time.Second, "how often HorizontalPodAutoscalers are looked at")
	f.DurationVar(&o.controlPlane.downscaleStabilization, "hpa-downscale-stabilization", 10*time.Second, "how long an HPA waits before it scales down")
	f.DurationVar(&o.controlPlane.nodeGrace, "node-grace", 20*time.Second, "how long a node may be silent; more where simulated nodes get too little of the processors to be heard in time")
	o.node.addFlags(f)
	return c
}

func (o *upOptions) run(dir string) error {
	l, err := openLab(dir)
	if err != nil {
		return err
	}
	if err := o.check(); err != nil {
		return err
	}
	if err := os.MkdirAll(l.path("logs"), 0o700); err != nil {
		return err
	}
	if s, err := l.state(); err != nil {
		return err
	} else if s != nil && s.alive() {
		return fmt.Errorf("a lab runs from %s already (pid %d, %s): stop it with kubelab down --dir %s, or choose another --dir", l.dir, s.PID, s.URL, l.dir)
	}
	if o.detach {
		return l.detach()
	}
	return o.serve(l)
}

// check refuses wrong flags before anything is changed.
func (o *upOptions) check() error {
	if net.ParseIP(o.host) == nil {
		return fmt.Errorf("--host %q is not an IP address", o.host)
	}
	if o.port < 0 || o.port > 65535 {
		return fmt.Errorf("--port %d is not a port: use 1 to 65535, or 0 for any free one", o.port)
	}
	if !o.withNode {
		return nil
	}
	if err := o.node.checkFlags(); err != nil {
		return err
	}
	o.host = o.node.gateway()
	return nil
}

// detach runs the same command in the background and shows what it says until it is ready.
func (l *lab) detach() error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	var args []string
	for _, a := range os.Args[1:] {
		if a != "--detach" && !strings.HasPrefix(a, "--detach=") {
			args = append(args, a)
		}
	}
	if err := os.RemoveAll(l.path("ready")); err != nil {
		return err
	}
	log, err := os.OpenFile(l.log("kubelab"), os.O_CREATE|os.O_RDWR|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	c := exec.Command(self, args...)
	c.Stdout, c.Stderr = log, log
	c.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := c.Start(); err != nil {
		return err
	}
	ended := make(chan struct{})
	go func() { _ = c.Wait(); close(ended) }()
	shown := int64(0)
	show := func() { // the log has two writers' offsets: read from where we were
		n, _ := io.Copy(os.Stdout, io.NewSectionReader(log, shown, 1<<20))
		shown += n
	}
	for {
		select {
		case <-ended:
			show()
			return fmt.Errorf("the lab did not start: %s; logs are in %s", lastWords(l.log("kubelab")), l.path("logs"))
		case <-time.After(50 * time.Millisecond):
		}
		show()
		if _, err := os.Stat(l.path("ready")); err == nil {
			return nil
		}
	}
}

// lastWords is the error a kubelab ended with: its log from the last line on that main.go began.
func lastWords(log string) string {
	b, err := os.ReadFile(log)
	if err != nil {
		return err.Error()
	}
	text := strings.TrimSpace(string(b))
	if at := strings.LastIndex("\n"+text, "\nkubelab: "); at >= 0 {
		return text[at+len("kubelab: "):]
	}
	return "it was killed"
}

// serve runs the lab until a signal, or until a component keeps dying.
func (o *upOptions) serve(l *lab) (err error) {
	runtime.LockOSThread() // see supervisor
	t := time.Now()
	lock, err := l.lock()
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := l.cleanUpCrash(); err != nil {
		return fmt.Errorf("the lab that ran from %s before did not end well, and cleaning up after it failed: %w", l.dir, err)
	}
	need := uint64(1024)
	if o.withNode {
		need = 3072
	}
	if err := checkDisk(l.dir, need); err != nil {
		return err
	}
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer cancel()
	s, err := newSupervisor(ctx, l)
	if err != nil {
		return err
	}
	l.host, l.port = o.host, o.port
	defer func() {
		_ = os.Remove(l.path("ready"))
		if s.node != nil {
			err = errors.Join(err, s.node.stop())
		}
		s.stop()
		err = errors.Join(err, l.clear())
	}()
	c, err := o.start(s)
	if err != nil {
		return err
	}
	s.say("up after %.1f s; kubeconfig: %s", time.Since(t).Seconds(), l.path("admin.kubeconfig"))
	if err := writeFile(l.path("ready"), []byte(l.url()+"\n")); err != nil {
		return err
	}
	return s.watch(c, o.kwokProgram())
}

func (o *upOptions) start(s *supervisor) (kubernetes.Interface, error) {
	if o.withNode {
		o.node.supervisor, o.node.dir = s, s.path("node")
		if err := o.node.checkHost(); err != nil {
			return nil, err
		}
		s.node = &o.node // from here on there is something to undo
		if err := o.node.prepare(); err != nil {
			return nil, err
		}
	}
	ports, err := freePorts(5)
	if err != nil {
		return nil, err
	}
	if s.port == 0 {
		s.port = ports[4]
	}
	if err := checkPort("tcp", s.host, s.port, "the API server", "choose another with --port, or leave --port out for any free one"); err != nil {
		return nil, err
	}
	if err := s.writePKI(o.node.Name); err != nil {
		return nil, err
	}
	o.controlPlane.etcdClient = fmt.Sprintf("http://127.0.0.1:%d", ports[0])
	o.controlPlane.etcdPeer = fmt.Sprintf("http://127.0.0.1:%d", ports[1])
	o.controlPlane.schedulerPort, o.controlPlane.controllerPort = ports[2], ports[3]
	if err := s.startControlPlane(o.controlPlane); err != nil {
		return nil, err
	}
	c, err := s.client()
	if err != nil {
		return nil, err
	}
	if o.withNode {
		if err := o.node.start(c); err != nil {
			return nil, err
		}
	}
	return c, s.waitServiceAccount(c)
}

// watch keeps a ready lab alive.
func (s *supervisor) watch(c kubernetes.Interface, kwok string) error {
	simulated := make(chan struct{})
	go waitSimulated(s.ctx, c, simulated)
	for {
		select {
		case <-s.ctx.Done():
			return nil
		case <-simulated:
			simulated = nil
			if err := s.startKwok(kwok); err != nil {
				s.say("simulated nodes stay NotReady: %v", err)
			}
		case e := <-s.exits:
			if e.ending {
				continue
			}
			if err := s.restart(e); err != nil {
				return err
			}
			if e.name == "kubelet" {
				go s.node.restoreGPUs(s.ctx, c)
			}
		}
	}
}

// lock keeps two "up" of the same folder apart; it ends with the process.
func (l *lab) lock() (*os.File, error) {
	f, err := os.OpenFile(l.path("lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("another kubelab starts or stops a lab in %s right now: wait for it, or choose another --dir", l.dir)
	}
	return f, nil
}

// program finds a helper: the one given, else beside kubelab, else in $PATH.
func program(given, name string) string {
	if given != "" {
		return given
	}
	if self, err := os.Executable(); err == nil {
		if p := filepath.Join(filepath.Dir(self), name); isFile(p) {
			return p
		}
	}
	p, err := exec.LookPath(name)
	if err != nil {
		return ""
	}
	return p
}

func isFile(path string) bool {
	s, err := os.Stat(path)
	return err == nil && s.Mode().IsRegular()
}
