package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sort"
	"strconv"
	"strings"
	"syscall"
)

// What a node changes on the machine outside its state folder: a bridge, nftables tables, cgroups, a
// few sysctls. Each step has its undo here, and every undo may run twice.

func run(name string, args ...string) error {
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}

// debianPackages are what a real node needs: a program and the package that brings it.
var debianPackages = [][2]string{
	{"containerd", "containerd"}, {"ctr", "containerd"}, {"runc", "runc"},
	{"/usr/lib/cni/bridge", "containernetworking-plugins"}, {"nft", "nftables"}, {"ip", "iproute2"}, {busybox, "busybox-static"},
}

// checkHost says what is missing before anything is changed; only what a dead lab left makes way.
func (n *node) checkHost() error {
	if os.Geteuid() != 0 {
		return errors.New("a real node needs root (mounts, network namespaces, cgroups): use sudo, or leave --node out for a control plane with simulated nodes")
	}
	if missing := missingPackages(); len(missing) > 0 {
		return fmt.Errorf("missing programs; run: apt-get install -y --no-install-recommends %s", strings.Join(missing, " "))
	}
	if err := n.clearBridge(); err != nil {
		return err
	}
	_, want, err := net.ParseCIDR(n.Subnet)
	if err != nil {
		return err
	}
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return err
	}
	for _, a := range addrs {
		if have, ok := a.(*net.IPNet); ok && (have.Contains(want.IP) || want.Contains(have.IP)) {
			return fmt.Errorf("--subnet %s overlaps with the address %s of this machine: choose another, such as 10.88.78.0/24", n.Subnet, have)
		}
	}
	if run("nft", "list", "table", "ip", "kube-proxy") == nil {
		return errors.New("another kube-proxy runs on this machine, or was killed here (nftables table ip kube-proxy): one real node a machine; if nothing uses it: nft delete table ip kube-proxy")
	}
	return nil
}

func missingPackages() (missing []string) {
	for _, w := range debianPackages {
		if _, err := exec.LookPath(w[0]); err != nil {
			missing = append(missing, w[1])
		}
	}
	if len(missing) == 0 && !isStatic(busybox) {
		missing = append(missing, "busybox-static")
	}
	return slices.Compact(missing)
}

// clearBridge makes way for the node where its bridge is taken. Each lab writes its folder into the bridge's alias: one that was
// killed, or whose folder was removed while it ran, is cleaned up after; one that runs is named in the error.
func (n *node) clearBridge() error {
	if _, err := net.InterfaceByName(n.Bridge); err != nil {
		return nil
	}
	alias, _ := os.ReadFile("/sys/class/net/" + n.Bridge + "/ifalias")
	dir, isLab := strings.CutPrefix(strings.TrimSpace(string(alias)), "kubelab:")
	if !isLab {
		return fmt.Errorf("network interface %s exists already and is not a lab's: choose another name with --bridge", n.Bridge)
	}
	if len(bridgeAlias(dir)) == aliasBytesMax { // cut off, perhaps: whether it runs cannot be told
		return fmt.Errorf("a lab in a folder that begins with %s has the bridge %s: stop it with kubelab down --dir", dir, n.Bridge)
	}
	owner := &lab{dir: dir}
	state, err := owner.state()
	if err != nil {
		return err
	}
	if state != nil && state.alive() {
		return fmt.Errorf("the lab in %s has the real node of this machine (bridge %s), and there can be only one: stop it with kubelab down --dir %s, or leave --node out", dir, n.Bridge, dir)
	}
	if pid := supervisorOf(dir); state == nil && pid != 0 {
		return fmt.Errorf("the lab in %s has the real node of this machine (bridge %s), and its state was removed while it ran: end it with kill %d", dir, n.Bridge, pid)
	}
	n.say("the lab in %s did not end well and left its node: cleaning up after it", dir)
	if state == nil { // nothing tells how its sysctls were
		return owner.cleanUpNode(nodeState{Bridge: n.Bridge})
	}
	lock, err := owner.lock()
	if err != nil {
		return err
	}
	defer lock.Close()
	return owner.cleanUpCrash()
}

// supervisorOf finds what runs the lab of a folder, by the folder in its etcd's arguments; 0 where nothing does.
func supervisorOf(dir string) int {
	procs, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, p := range procs {
		b, _ := os.ReadFile(p)
		if name, args, _ := strings.Cut(string(b), "\x00"); name != "etcd" || !strings.Contains(args, dir+"/") {
			continue
		}
		stat, _ := os.ReadFile(filepath.Join(filepath.Dir(p), "stat"))
		if f := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:])); len(f) > 1 {
			parent, _ := strconv.Atoi(f[1])
			return parent
		}
	}
	return 0
}

// checkPorts finds out whether the fixed ports on the bridge's address are free.
func (n *node) checkPorts() error {
	for _, p := range []struct {
		network string
		port    int
		use     string
	}{
		{"tcp", 10250, "kubelet"}, {"tcp", 10249, "kube-proxy's metrics"}, {"tcp", 10256, "kube-proxy's health"},
		{"tcp", 53, "cluster DNS"}, {"udp", 53, "cluster DNS"}, {"tcp", 8181, "cluster DNS' health"},
	} {
		if err := checkPort(p.network, n.gateway(), p.port, p.use, "stop that program, or bind it to an address other than 0.0.0.0"); err != nil {
			return err
		}
	}
	return nil
}

func (n *node) bridgeUp() error {
	_, sub, err := net.ParseCIDR(n.Subnet)
	if err != nil {
		return err
	}
	ones, _ := sub.Mask.Size()
	for _, a := range [][]string{
		{"link", "add", "name", n.Bridge, "type", "bridge"},
		{"link", "set", "dev", n.Bridge, "alias", bridgeAlias(n.supervisor.dir)},
		{"addr", "add", n.gateway() + "/" + strconv.Itoa(ones), "dev", n.Bridge},
		{"link", "set", n.Bridge, "up"},
	} {
		if err := run("ip", a...); err != nil {
			return err
		}
	}
	if n.Egress {
		for _, a := range [][]string{
			{"add", "table", "ip", n.Bridge},
			{"add", "chain", "ip", n.Bridge, "post", "{ type nat hook postrouting priority 100 ; }"},
			{"add", "rule", "ip", n.Bridge, "post", "ip", "saddr", n.Subnet, "ip", "daddr", "!=", n.Subnet, "masquerade"},
		} {
			if err := run("nft", a...); err != nil {
				return err
			}
		}
	}
	return nil
}

// aliasBytesMax is what the kernel keeps of an alias.
const aliasBytesMax = 255

// bridgeAlias names the lab that a bridge belongs to.
func bridgeAlias(dir string) string {
	a := "kubelab:" + dir
	return a[:min(len(a), aliasBytesMax)]
}

func (n *node) bridgeDown() {
	_ = run("nft", "delete", "table", "ip", n.Bridge)
	_ = run("nft", "delete", "table", "ip", "kube-proxy")
	_ = run("nft", "delete", "table", "ip6", "kube-proxy")
	_ = run("ip", "link", "del", n.Bridge)
}

// cgroupDirs lists the node's cgroup in every hierarchy: one per controller on
// cgroup v1, a single one on v2.
func (n *node) cgroupDirs() []string {
	var dirs []string
	for _, m := range mounts() {
		if m.fstype == "cgroup" || m.fstype == "cgroup2" {
			dirs = append(dirs, filepath.Join(m.point, n.Bridge))
		}
	}
	return dirs
}

func (n *node) cgroupsUp() error {
	for _, d := range n.cgroupDirs() {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
		// a v1 cpuset is unusable until both files are set
		for _, f := range []string{"cpuset.cpus", "cpuset.mems"} {
			b, err := os.ReadFile(filepath.Join(d, "..", f))
			if errors.Is(err, fs.ErrNotExist) || filepath.Base(filepath.Dir(d)) == "unified" {
				continue
			} else if err != nil {
				return err
			}
			if err := os.WriteFile(filepath.Join(d, f), b, 0o644); err != nil {
				return err
			}
		}
	}
	return nil
}

// cgroupsDown kills what is left in the node's cgroups and removes them, deepest first.
func (n *node) cgroupsDown() error {
	var last error
	for _, top := range n.cgroupDirs() {
		var dirs []string
		_ = filepath.WalkDir(top, func(p string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				dirs = append(dirs, p)
			}
			return nil
		})
		for i := len(dirs) - 1; i >= 0; i-- {
			for _, pid := range pidsIn(dirs[i]) {
				_ = syscall.Kill(pid, syscall.SIGKILL)
			}
			if err := retry(20, func() error { return os.Remove(dirs[i]) }); err != nil {
				last = err
			}
		}
	}
	return last
}

func pidsIn(cgroup string) (pids []int) {
	b, _ := os.ReadFile(filepath.Join(cgroup, "cgroup.procs"))
	for _, s := range strings.Fields(string(b)) {
		if pid, err := strconv.Atoi(s); err == nil && pid > 1 {
			pids = append(pids, pid)
		}
	}
	return pids
}

// sysctls that kubelet or the bridge plugin may set.
var sysctls = []string{
	"net/ipv4/ip_forward", "vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops",
	"kernel/keys/root_maxkeys", "kernel/keys/root_maxbytes",
}

func saveSysctls() map[string]string {
	old := map[string]string{}
	for _, s := range sysctls {
		if b, err := os.ReadFile("/proc/sys/" + s); err == nil {
			old[s] = strings.TrimSpace(string(b))
		}
	}
	return old
}

func restoreSysctls(old map[string]string) {
	for s, v := range old {
		_ = os.WriteFile("/proc/sys/"+s, []byte(v), 0o644)
	}
}

type mount struct{ point, fstype string }

func mounts() (list []mount) {
	f, err := os.Open("/proc/self/mounts")
	if err != nil {
		return nil
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if w := strings.Fields(s.Text()); len(w) > 2 {
			list = append(list, mount{w[1], w[2]})
		}
	}
	return list
}

// unmountUnder removes every mount below dir, deepest first.
func unmountUnder(dir string) {
	var points []string
	for _, m := range mounts() {
		if strings.HasPrefix(m.point, dir+"/") {
			points = append(points, m.point)
		}
	}
	sort.Sort(sort.Reverse(sort.StringSlice(points)))
	for _, p := range points {
		_ = syscall.Unmount(p, syscall.MNT_DETACH)
	}
}

// killShims ends container shims of this node's containerd, found by its socket path.
func killShims(sock string) {
	procs, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, p := range procs {
		b, _ := os.ReadFile(p)
		a := strings.Split(string(b), "\x00")
		for i := range a {
			if a[i] == "-address" && i+1 < len(a) && a[i+1] == sock {
				pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(p)))
				_ = syscall.Kill(pid, syscall.SIGKILL)
			}
		}
	}
}

// removeStrays removes what containerd, CNI and kubelet leave at fixed places outside
// the state folder: log links into it, the device plugin socket, empty folders.
func removeStrays(dir string) {
	links, _ := filepath.Glob("/var/log/containers/*.log")
	for _, f := range links {
		if to, err := os.Readlink(f); err == nil && strings.HasPrefix(to, dir+"/") {
			_ = os.Remove(f)
		}
	}
	for _, d := range []string{
		"/run/containerd/s", "/run/containerd", "/var/lib/cni/results", "/var/lib/cni", "/var/log/containers",
		"/var/lib/kubelet/device-plugins/kubelet.sock", "/var/lib/kubelet/device-plugins", "/var/lib/kubelet",
	} {
		_ = os.Remove(d) // a folder that something else uses is not empty and stays
	}
}
