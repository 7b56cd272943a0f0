package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"time"

	"github.com/spf13/pflag"
	"k8s.io/client-go/kubernetes"
	criapi "k8s.io/cri-api/pkg/apis"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	criclient "k8s.io/cri-client/pkg"
)

// node is a real Kubernetes node on this machine: Debian's containerd, runc and CNI plugins with this
// binary's kubelet and kube-proxy. It lives in <lab>/node. The control plane listens on the node's
// bridge, so that pods reach it and nothing outside the machine does.
type node struct {
	*supervisor
	nodeState
	dir     string
	gpus    gpuSpec
	coredns string
	changed bool // something outside the state folder may have to be undone
}

// nodeState is what cleaning up after a crash must know.
type nodeState struct {
	Name    string            `json:"name"`
	Bridge  string            `json:"bridge"`
	Subnet  string            `json:"subnet"`
	Egress  bool              `json:"egress"`
	Sysctls map[string]string `json:"sysctls"`
}

func (n *node) addFlags(f *pflag.FlagSet) {
	f.StringVar(&n.Name, "node-name", "lab-node", "name of the real node")
	f.StringVar(&n.Bridge, "bridge", "kubelab0", "bridge of the real node; also the name of its cgroup and nftables table")
	f.StringVar(&n.Subnet, "subnet", "10.88.77.0/24", "pod network; its first address is the bridge's")
	f.BoolVar(&n.Egress, "egress", false, "let pods reach the world outside this machine (masquerade)")
	f.StringVar(&n.coredns, "coredns", "", "CoreDNS; default: coredns beside kubelab or in $PATH")
	n.gpus.addFlags(f, "gpus", 0, "GPUs that the real node advertises without having them")
}

var interfaceName = regexp.MustCompile(`^[a-z][a-z0-9-]{0,14}$`)

func (n *node) checkFlags() error {
	if !interfaceName.MatchString(n.Bridge) {
		return fmt.Errorf("--bridge %q cannot name a network interface: use at most 15 of a-z, 0-9 and -, a letter first", n.Bridge)
	}
	ip, subnet, err := net.ParseCIDR(n.Subnet)
	if err != nil || ip.To4() == nil {
		return fmt.Errorf("--subnet %q is not an IPv4 network such as 10.88.77.0/24", n.Subnet)
	}
	if ones, _ := subnet.Mask.Size(); ones < 16 || ones > 28 {
		return fmt.Errorf("--subnet %s: use a mask from /16 to /28", n.Subnet)
	}
	return n.gpus.check()
}

// gateway is the first address of the pod network.
func (n *node) gateway() string {
	_, subnet, err := net.ParseCIDR(n.Subnet)
	if err != nil {
		return ""
	}
	ip := subnet.IP.To4()
	return net.IPv4(ip[0], ip[1], ip[2], ip[3]+1).String()
}

func (n *node) file(name string) string { return filepath.Join(n.dir, name) }
func (n *node) socket() string          { return n.file("containerd.sock") }

// ctr runs containerd's own client on the images of the node.
func (n *node) ctr(args ...string) error {
	return run("ctr", append([]string{"-a", n.socket(), "-n", "k8s.io"}, args...)...)
}

// prepare makes the bridge, which the API server is going to listen on.
func (n *node) prepare() error {
	n.changed = true
	n.Sysctls = saveSysctls()
	if err := os.MkdirAll(n.dir, 0o700); err != nil {
		return err
	}
	if err := n.save(); err != nil { // before the first change, so that a crash can be cleaned up
		return err
	}
	if err := n.bridgeUp(); err != nil {
		return err
	}
	if err := n.checkPorts(); err != nil {
		return err
	}
	return n.cgroupsUp()
}

// start runs containerd, kubelet, kube-proxy and CoreDNS. The API server is up.
func (n *node) start(c kubernetes.Interface) error {
	t := time.Now()
	if err := n.writeConfigs(); err != nil {
		return err
	}
	if err := n.startProgram("containerd", "containerd", "-c", n.file("containerd.toml")); err != nil {
		return err
	}
	if err := n.importPause(); err != nil {
		return err
	}
	if err := n.supervisor.start("kubelet", "--config="+n.file("kubelet.yaml"), "--kubeconfig="+n.pki("kubelet.kubeconfig"),
		"--root-dir="+n.file("kubelet"), "--cert-dir="+n.file("kubelet/pki"), "--hostname-override="+n.Name,
		"--node-ip="+n.gateway(), "--v=1"); err != nil {
		return err
	}
	if err := n.supervisor.start("kube-proxy", "--config="+n.file("kube-proxy.yaml"), "--v=1"); err != nil {
		return err
	}
	if coredns := program(n.coredns, "coredns"); coredns == "" {
		n.say("no cluster DNS: coredns is neither beside kubelab nor in $PATH, and --coredns is not given")
	} else {
		if err := addDNS(c, n.gateway()); err != nil {
			return fmt.Errorf("cluster DNS: %w", err)
		}
		if err := n.startProgram("coredns", coredns, "-conf", n.file("Corefile")); err != nil {
			return err
		}
	}
	if err := n.waitReady(c); err != nil {
		return err
	}
	if err := n.gpus.advertise(n.ctx, c, n.Name); err != nil {
		return err
	}
	if err := n.waitProxy(); err != nil {
		return err
	}
	n.say("node %s ready after %.1f s; images: kubelab images import FILE", n.Name, time.Since(t).Seconds())
	return nil
}

func (n *node) importPause() error {
	if err := writePause(n.file("pause.tar")); err != nil {
		return err
	}
	var last error
	err := n.waitFor("containerd", 20*time.Second, func(context.Context) bool {
		last = n.ctr("images", "import", n.file("pause.tar"))
		return last == nil
	})
	return errors.Join(err, last)
}

// stop ends the node and removes all traces of it. Kubelet goes first, so that nothing is started
// again; containerd goes last, because it takes the pods down.
func (n *node) stop() error {
	if !n.changed {
		return nil
	}
	for _, name := range []string{"kubelet", "kube-proxy", "coredns"} {
		n.end(name)
	}
	podsErr := n.removePods()
	n.end("containerd")
	killShims(n.socket())
	cgroupErr := n.cgroupsDown()
	unmountUnder(n.dir)
	n.bridgeDown()
	restoreSysctls(n.Sysctls)
	rmErr := retry(10, func() error { return os.RemoveAll(n.dir) })
	removeStrays(n.dir)
	return errors.Join(podsErr, cgroupErr, rmErr)
}

// stopAfterCrash is stop for a lab that was killed. Pods outlive their containerd; a fresh one finds
// them again and takes them down as usual.
func (n *node) stopAfterCrash() error {
	_ = os.Remove(n.socket()) // nothing listens on it any more
	if _, err := os.Stat(n.file("containerd.toml")); err == nil {
		if err := n.startProgram("containerd", "containerd", "-c", n.file("containerd.toml")); err != nil {
			return err
		}
		if err := retry(50, func() error { return n.ctr("version") }); err != nil {
			fmt.Fprintln(os.Stderr, "kubelab: going on without containerd:", err)
		}
	}
	return n.stop()
}

// removePods takes every sandbox down through the CRI, which undoes its network, mounts and cgroups.
func (n *node) removePods() error {
	if _, err := os.Stat(n.socket()); err != nil {
		return nil // containerd never ran
	}
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	var c criapi.RuntimeService
	if err := retry(50, func() (err error) { // containerd listens before its CRI answers
		c, err = criclient.NewRemoteRuntimeService(ctx, "unix://"+n.socket(), 10*time.Second, nil, false)
		return err
	}); err != nil {
		return err
	}
	pods, err := c.ListPodSandbox(ctx, &runtimeapi.PodSandboxFilter{})
	if err != nil {
		return err
	}
	var errs []error
	for _, p := range pods {
		errs = append(errs, c.StopPodSandbox(ctx, p.Id), c.RemovePodSandbox(ctx, p.Id))
	}
	return errors.Join(errs...)
}

func retry(times int, f func() error) (err error) {
	for range times {
		if err = f(); err == nil {
			return nil
		}
		time.Sleep(100 * time.Millisecond)
	}
	return err
}
