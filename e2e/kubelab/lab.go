package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// lab is one Kubernetes and the folder that holds all of its state:
//
//	admin.kubeconfig  the way in                ready     exists while the lab can be used
//	lab.json          what runs, for "down"     logs/     one file for each component; kept by "down"
//	audit.log         who wrote what, if asked  pki/ etcd/ node/  private to the components
type lab struct {
	dir  string
	host string
	port int
}

// labState is lab.json: enough to stop the lab and to clean up after a crash.
type labState struct {
	PID       int            `json:"pid"`
	Started   uint64         `json:"started"` // start time of PID in clock ticks: tells it from a later process with the same number
	URL       string         `json:"url"`
	Node      *nodeState     `json:"node,omitempty"`
	Processes []processState `json:"processes"`
}

type processState struct {
	Name     string `json:"name"`
	PID      int    `json:"pid"`
	Restarts int    `json:"restarts"`
}

func openLab(dir string) (*lab, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	return &lab{dir: abs}, nil
}

func (l *lab) path(name string) string { return filepath.Join(l.dir, name) }
func (l *lab) pki(name string) string  { return filepath.Join(l.dir, "pki", name) }
func (l *lab) log(name string) string  { return filepath.Join(l.dir, "logs", name+".log") }
func (l *lab) url() string {
	return "https://" + net.JoinHostPort(l.host, strconv.Itoa(l.port))
}

// state reads lab.json; nil without an error means that no lab is here.
func (l *lab) state() (*labState, error) {
	b, err := os.ReadFile(l.path("lab.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	s := &labState{}
	if err := json.Unmarshal(b, s); err != nil {
		return nil, fmt.Errorf("%s is damaged (%w): remove it when no lab runs from this folder", l.path("lab.json"), err)
	}
	return s, nil
}

// running returns the state of the lab, or an error that says how to start one.
func (l *lab) running() (*labState, error) {
	s, err := l.state()
	if err != nil {
		return nil, err
	}
	if s == nil || !s.alive() {
		return nil, fmt.Errorf("no lab runs from %s: start one with kubelab up --dir %s, or name another folder with --dir", l.dir, l.dir)
	}
	return s, nil
}

// writeFile replaces a file in one step, so that a reader never sees half of it.
func writeFile(path string, data []byte) error {
	tmp := path + ".new"
	if err := os.WriteFile(tmp, data, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}

func (s *labState) alive() bool {
	started, ok := processStart(s.PID)
	return ok && started == s.Started
}

// processStart is the start time of a live process; a zombie is not alive.
func processStart(pid int) (uint64, bool) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, false
	}
	return parseStart(string(b))
}

// parseStart reads fields 3 (state) and 22 (start time) of /proc/PID/stat; field 2 is the command in
// brackets and may hold anything, brackets and spaces included.
func parseStart(stat string) (uint64, bool) {
	f := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
	if len(f) < 20 || f[0] == "Z" || f[0] == "X" {
		return 0, false
	}
	started, err := strconv.ParseUint(f[19], 10, 64)
	return started, err == nil
}

// clear removes what a lab leaves in its folder; logs and what it does not know stay.
func (l *lab) clear() error {
	var errs []error
	for _, name := range []string{"ready", "admin.kubeconfig", "pki", "etcd", "flexvolume", "kwok.yaml", "audit.yaml", "audit.log", "lab.json"} {
		errs = append(errs, os.RemoveAll(l.path(name)))
	}
	return errors.Join(errs...)
}

// checkDisk refuses to start what would fail later in a less clear way.
func checkDisk(dir string, needMiB uint64) error {
	var s syscall.Statfs_t
	if err := syscall.Statfs(dir, &s); err != nil {
		return err
	}
	if free := s.Bavail * uint64(s.Bsize) >> 20; free < needMiB {
		return fmt.Errorf("disk is nearly full: %d MiB free under %s, a lab needs %d MiB; free some space or choose another folder with --dir", free, dir, needMiB)
	}
	return nil
}

// freePorts returns n different free ports of the loopback address. They lie below those that the kernel gives to connections, where
// there is room: between here and the component that listens, a connection of anyone could take one of those.
func freePorts(n int) ([]int, error) {
	end := min(firstEphemeralPort(), firstNodePort)
	var ports []int
	for range 50 * n {
		port := 0
		if end > lowestPort+1000 {
			port = lowestPort + rand.IntN(end-lowestPort)
		}
		s, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
		if errors.Is(err, syscall.EADDRINUSE) {
			continue
		} else if err != nil {
			return nil, fmt.Errorf("no free port on 127.0.0.1: %w", err)
		}
		defer s.Close() // after the loop: each port is held until all are chosen
		if ports = append(ports, s.Addr().(*net.TCPAddr).Port); len(ports) == n {
			return ports, nil
		}
	}
	return nil, fmt.Errorf("no %d free ports on 127.0.0.1", n)
}

const (
	lowestPort    = 20000 // fixed ports of other programs mostly lie below
	firstNodePort = 30000 // those of Services of type NodePort
)

// firstEphemeralPort is the least port that the kernel gives to connections, 0 where that is not known.
func firstEphemeralPort() int {
	b, _ := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range")
	first, _, _ := strings.Cut(string(b), "\t")
	port, _ := strconv.Atoi(first)
	return port
}

// checkPort says in words what a taken port means.
func checkPort(network, host string, port int, use, wayOut string) error {
	addr := net.JoinHostPort(host, strconv.Itoa(port))
	var err error
	if network == "udp" {
		var c net.PacketConn
		if c, err = net.ListenPacket(network, addr); err == nil {
			return c.Close()
		}
	} else {
		var s net.Listener
		if s, err = net.Listen(network, addr); err == nil {
			return s.Close()
		}
	}
	if errors.Is(err, syscall.EADDRINUSE) {
		return fmt.Errorf("port %d/%s on %s is taken and is needed for %s: %s (ss -lnp 'sport = :%d' shows who has it)", port, network, host, use, wayOut, port)
	}
	return fmt.Errorf("port %d/%s on %s is needed for %s: %w", port, network, host, use, err)
}

// tail returns the last lines of a file, for error messages.
func tail(path string, lines int) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	if len(b) > 8192 {
		b = b[len(b)-8192:]
	}
	all := strings.Split(strings.TrimSpace(string(b)), "\n")
	return "  " + strings.Join(all[max(0, len(all)-lines):], "\n  ")
}
