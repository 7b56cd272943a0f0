package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestParseStartReadsPastABracketInTheCommandName(t *testing.T) {
	line := "42 (a) b (c) S 1 42 42 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 98765 1000 2 3"
	if started, ok := parseStart(line); !ok || started != 98765 {
		t.Errorf("got %d, %v", started, ok)
	}
}

func TestAZombieIsNotAlive(t *testing.T) {
	line := "42 (a) Z 1 42 42 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 98765 1000 2 3"
	if _, ok := parseStart(line); ok {
		t.Error("a zombie counts as alive")
	}
	if _, ok := parseStart("42 (a) S 1"); ok {
		t.Error("a short line counts as alive")
	}
}

func TestStateTellsAProcessFromALaterOneWithTheSameNumber(t *testing.T) {
	started, ok := processStart(os.Getpid())
	if !ok {
		t.Fatal("this process is not alive")
	}
	if s := (&labState{PID: os.Getpid(), Started: started}); !s.alive() {
		t.Error("this process is not seen")
	}
	if s := (&labState{PID: os.Getpid(), Started: started + 1}); s.alive() {
		t.Error("another process is taken for the lab")
	}
}

func TestADamagedStateFileSaysWhatToDo(t *testing.T) {
	l, _ := openLab(t.TempDir())
	if s, err := l.state(); s != nil || err != nil {
		t.Fatalf("empty folder: %v, %v", s, err)
	}
	if err := os.WriteFile(l.path("lab.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := l.state(); err == nil || !strings.Contains(err.Error(), "remove it") {
		t.Errorf("got %v", err)
	}
}

func TestFreePortsAreDifferent(t *testing.T) {
	ports, err := freePorts(20)
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(ports)
	if len(slices.Compact(ports)) != 20 {
		t.Errorf("twice the same port: %v", ports)
	}
	if first := firstEphemeralPort(); first > lowestPort+1000 && (ports[0] < lowestPort || ports[19] >= first) {
		t.Errorf("not below the ports of connections, which begin at %d: %v", first, ports)
	}
}

func TestATakenPortIsNamedWithItsUse(t *testing.T) {
	s, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	port := s.Addr().(*net.TCPAddr).Port
	err = checkPort("tcp", "127.0.0.1", port, "the API server", "choose another with --port")
	if err == nil || !strings.Contains(err.Error(), "is taken and is needed for the API server: choose another with --port") {
		t.Errorf("got %v", err)
	}
}

func TestAFullDiskIsRefusedBeforeTheStart(t *testing.T) {
	if err := checkDisk(t.TempDir(), 1<<40); err == nil || !strings.Contains(err.Error(), "--dir") {
		t.Errorf("got %v", err)
	}
	if err := checkDisk(t.TempDir(), 0); err != nil {
		t.Error(err)
	}
}

func TestTwoStartsInOneFolderAreKeptApart(t *testing.T) {
	l, _ := openLab(t.TempDir())
	first, err := l.lock()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.lock(); err == nil {
		t.Error("the second got the lock too")
	}
	first.Close()
	second, err := l.lock()
	if err != nil {
		t.Fatalf("the lock outlives its holder: %v", err)
	}
	second.Close()
}

func TestClearKeepsLogsAndWhatItDoesNotKnow(t *testing.T) {
	l, _ := openLab(t.TempDir())
	for _, f := range []string{"logs/etcd.log", "bin/kubelab", "pki/ca.key", "etcd/member", "lab.json", "ready", "admin.kubeconfig"} {
		if err := os.MkdirAll(filepath.Dir(l.path(f)), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(l.path(f), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.clear(); err != nil {
		t.Fatal(err)
	}
	left, _ := filepath.Glob(l.path("*"))
	if want := []string{l.path("bin"), l.path("logs")}; !slices.Equal(left, want) {
		t.Errorf("left: %v, want: %v", left, want)
	}
}

func TestTheVersionIsThatOfTheModule(t *testing.T) {
	b, err := os.ReadFile("go.mod")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(b), "\tk8s.io/kubernetes "+kubernetesVersion+"\n") {
		t.Errorf("kubernetesVersion is %s, go.mod has another k8s.io/kubernetes", kubernetesVersion)
	}
	staging := "v0" + strings.TrimPrefix(kubernetesVersion, "v1")
	for line := range strings.Lines(string(b)) {
		if from, to, ok := strings.Cut(line, "=>"); ok && !strings.HasSuffix(strings.TrimSpace(to), " "+staging) {
			t.Errorf("%s is mapped to %s, not to %s", strings.TrimSpace(from), strings.TrimSpace(to), staging)
		}
	}
}

func TestTheLastLinesOfALog(t *testing.T) {
	f := filepath.Join(t.TempDir(), "log")
	if err := os.WriteFile(f, []byte("one\ntwo\nthree\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := tail(f, 2); got != "  two\n  three" {
		t.Errorf("got %q", got)
	}
}

func TestTheLastWordsOfAStart(t *testing.T) {
	f := filepath.Join(t.TempDir(), "log")
	for log, want := range map[string]string{
		"etcd ready\nkubelab: port 1 is taken:\n  by another\n": "port 1 is taken:\n  by another",
		"kubelab: going on\nkubelab: no disk\n":                 "no disk",
		"etcd ready\n":                                          "it was killed",
	} {
		if err := os.WriteFile(f, []byte(log), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := lastWords(f); got != want {
			t.Errorf("%q: got %q", log, got)
		}
	}
}

// A bridge of another lab: one that runs keeps it, one that died makes way, and what is nobody's lab stays.
func TestTheBridgeOfADeadLabMakesWay(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("makes a network bridge: needs root")
	}
	if run("nft", "list", "table", "ip", "kube-proxy") == nil {
		t.Skip("a real node runs on this machine")
	}
	const bridge = "kubelab-test"
	mine, _ := openLab(t.TempDir())
	other, _ := openLab(t.TempDir())
	supervisor, err := newSupervisor(t.Context(), mine)
	if err != nil {
		t.Fatal(err)
	}
	n := &node{supervisor: supervisor, nodeState: nodeState{Bridge: bridge}}
	for _, c := range []struct {
		alias, state, refused string
	}{
		{alias: "", refused: "not a lab's: choose another name with --bridge"},
		{alias: "kubelab:" + other.dir, state: fmt.Sprintf(`{"pid": %d, "started": %d}`, os.Getpid(), supervisor.started), refused: "kubelab down --dir " + other.dir},
		{alias: bridgeAlias("/" + strings.Repeat("long/", 60)), refused: "a folder that begins with"},
		{alias: "kubelab:" + other.dir, state: fmt.Sprintf(`{"pid": %d, "started": 1, "node": {"bridge": %q}}`, os.Getpid(), bridge)},
		{alias: "kubelab:" + other.dir},
		{alias: "kubelab:" + other.dir + "/removed"},
	} {
		if err := run("ip", "link", "add", "name", bridge, "type", "bridge"); err != nil {
			t.Skip(err)
		}
		if err := run("ip", "link", "set", "dev", bridge, "alias", c.alias); err != nil {
			t.Error(err)
		}
		if err := errors.Join(os.RemoveAll(other.path("lab.json")), os.RemoveAll(other.path("node"))); err != nil {
			t.Error(err)
		}
		if c.state != "" {
			if err := os.WriteFile(other.path("lab.json"), []byte(c.state), 0o600); err != nil {
				t.Error(err)
			}
		}
		err := n.clearBridge()
		_, there := net.InterfaceByName(bridge)
		if c.refused == "" && (err != nil || there == nil) {
			t.Errorf("%+v: got %v, and the bridge is there: %v", c, err, there == nil)
		}
		if c.refused != "" && (err == nil || !strings.Contains(err.Error(), c.refused) || there != nil) {
			t.Errorf("%+v: got %v, and the bridge is there: %v", c, err, there == nil)
		}
		if s, _ := other.state(); c.state != "" && c.refused == "" && s != nil {
			t.Errorf("%+v: its state is left", c)
		}
		_ = run("ip", "link", "del", bridge)
	}
}

func TestKubectlGetsItsOwnArguments(t *testing.T) {
	for _, c := range []struct {
		args, rest []string
		dir        string
	}{
		{[]string{"get", "pods"}, []string{"get", "pods"}, "default"},
		{[]string{"--dir", "x", "get"}, []string{"get"}, "x"},
		{[]string{"--dir=x", "get"}, []string{"get"}, "x"},
		{[]string{"exec", "p", "--", "--dir", "x"}, []string{"exec", "p", "--", "--dir", "x"}, "default"},
	} {
		dir, rest := leadingDir(c.args, "default")
		if dir != c.dir || !slices.Equal(rest, c.rest) {
			t.Errorf("%v: got %q %v", c.args, dir, rest)
		}
	}
}
