package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// The control-plane mode: no real node, so the operator runs as a process of this machine, with its own
// service account and the chart's roles. Pods on simulated nodes do not compute.

const (
	fleet       = "docs/guide/gpu-fleet.yaml"
	fleetNodes  = "4"
	fleetWait   = 60 * time.Second
	operatorLog = "logs/operator.log"
)

func (s *session) simulateStep() step {
	return step{name: "add simulated GPU nodes", run: func() (string, error) {
		have, err := s.output(s.kubectl("get", "nodes", "--selector=type=kwok", "--output=name"))
		if err != nil {
			return "", err
		}
		if have != "" {
			return "there already", nil
		}
		return s.output(s.command(s.tool("kubelab"), "simulate", "--count", fleetNodes, "--gpus", "8",
			"--product", "NVIDIA-H200", "--memory-mib", "143771"))
	}}
}

// operatorProcessStep starts the operator with no more rights than the chart gives it.
func (s *session) operatorProcessStep() step {
	return step{name: "run the operator on this machine", run: func() (string, error) {
		if err := s.installCRDs(); err != nil {
			return "", err
		}
		roles := s.command(s.tool("helm"), "template", "cachalot", s.repoFile("charts/cachalot"), "--namespace", systemNamespace,
			"--show-only", "templates/serviceaccount.yaml", "--show-only", "templates/rbac.yaml")
		manifests, err := s.output(roles)
		if err != nil {
			return "", err
		}
		apply := s.kubectl("apply", "--filename=-")
		apply.Stdin = strings.NewReader(manifests)
		if err := s.exec(apply); err != nil {
			return "", err
		}
		if err := s.operatorKubeconfig(); err != nil {
			return "", err
		}
		if err := s.stopOperator(); err != nil {
			return "", err
		}
		return s.startOperator()
	}}
}

// operatorKubeconfig is the administrator's with the user replaced by the operator's service account.
func (s *session) operatorKubeconfig() error {
	token, err := s.output(s.kubectl("--namespace", systemNamespace, "create", "token", "cachalot", "--duration=720h"))
	if err != nil {
		return err
	}
	text, err := s.output(s.kubectl("config", "view", "--raw", "--output=json"))
	if err != nil {
		return err
	}
	var config map[string]any
	if err := json.Unmarshal([]byte(text), &config); err != nil {
		return err
	}
	config["users"] = []any{map[string]any{"name": "admin", "user": map[string]string{"token": token}}}
	b, err := json.Marshal(config)
	if err != nil {
		return err
	}
	return writeFile(s.labFile("operator.kubeconfig"), b)
}

func (s *session) startOperator() (string, error) {
	address, err := freeAddress()
	if err != nil {
		return "", err
	}
	log, err := os.Create(s.labFile(operatorLog))
	if err != nil {
		return "", err
	}
	defer log.Close()
	c := exec.Command(s.binary("operator"), "run", "--engine-image=localhost/cachalot-engine:dev", "--bind="+address)
	c.Env = append(os.Environ(), "KUBECONFIG="+s.labFile("operator.kubeconfig"), "POD_NAMESPACE="+systemNamespace, "POD_NAME=on-this-machine")
	c.Stdout, c.Stderr = log, log
	c.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // it outlives this program; make down ends it
	if err := c.Start(); err != nil {
		return "", err
	}
	started, _ := processStart(c.Process.Pid)
	if err := writeFile(s.labFile("operator.pid"), fmt.Appendf(nil, "%d %s", c.Process.Pid, started)); err != nil {
		return "", err
	}
	ended := make(chan struct{})
	go func() { _ = c.Wait(); close(ended) }()
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); {
		if r, err := http.Get("http://" + address + "/readyz"); err == nil {
			r.Body.Close()
			if r.StatusCode == http.StatusOK {
				return "metrics at http://" + address + "/metrics", nil
			}
		}
		select {
		case <-ended:
			return "", fmt.Errorf("the operator ended; the last lines of %s:\n%s", s.labFile(operatorLog), tail(s.labFile(operatorLog), 10))
		case <-s.ctx.Done():
			return "", s.ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
	}
	return "", fmt.Errorf("the operator is not ready after 30 s; the last lines of %s:\n%s", s.labFile(operatorLog), tail(s.labFile(operatorLog), 10))
}

// stopOperator ends the operator of this lab, if it is still that process.
func (s *session) stopOperator() error {
	b, err := os.ReadFile(s.labFile("operator.pid"))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	pidText, started, _ := strings.Cut(string(b), " ")
	pid, err := strconv.Atoi(pidText)
	if err != nil {
		return fmt.Errorf("%s is damaged: %q", s.labFile("operator.pid"), b)
	}
	same := func() bool { now, ok := processStart(pid); return ok && now == started }
	if same() {
		_ = syscall.Kill(pid, syscall.SIGTERM)
		for end := time.Now().Add(20 * time.Second); same() && time.Now().Before(end); {
			time.Sleep(50 * time.Millisecond)
		}
		if same() {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	}
	return os.Remove(s.labFile("operator.pid"))
}

// processStart is the start time of a live process: with the pid it names a process for good.
func processStart(pid int) (string, bool) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return "", false
	}
	f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	if len(f) < 20 || f[0] == "Z" {
		return "", false
	}
	return f[19], true
}

// fleetStep applies a model that fits and one that cannot, and waits until the operator has judged both.
func (s *session) fleetStep() step {
	return step{
		name: "plan DeepSeek-R1 for the simulated nodes",
		hint: "see " + s.labFile(operatorLog),
		run: func() (string, error) {
			if err := s.exec(s.kubectl("apply", "--filename", s.repoFile(fleet))); err != nil {
				return "", err
			}
			for end := time.Now().Add(fleetWait); time.Now().Before(end); time.Sleep(300 * time.Millisecond) {
				fits, err1 := s.getModel("deepseek-r1")
				refused, err2 := s.getModel("deepseek-r1-too-large")
				if s.ctx.Err() != nil {
					return "", s.ctx.Err()
				}
				if err := errors.Join(err1, err2); err != nil {
					return "", err
				}
				s.ui.say("%s", fits.progress())
				placed, err := s.output(s.kubectl("get", "pods", "--selector=cachalot.dev/model-deployment=deepseek-r1",
					"--field-selector=status.phase=Running", "--output=name"))
				if err != nil {
					return "", err
				}
				if strings.Count(placed, "pod/") == 2 && refused.condition("Planned").Status == "False" {
					return "two replicas placed, one model refused", nil
				}
			}
			s.collect("get", "mdep,pods", "--output=wide")
			s.collect("describe", "mdep")
			return "", fmt.Errorf("the operator has not placed two replicas and refused the third within %s", seconds(fleetWait))
		},
	}
}

func (s *session) printFleet(took time.Duration) {
	out := func(args ...string) string {
		b, err := s.kubectl(args...).Output()
		if err != nil {
			return err.Error()
		}
		return "    " + strings.ReplaceAll(strings.TrimSpace(string(b)), "\n", "\n    ")
	}
	s.ui.println("\n" + out("get", "mdep") + "\n\n" + out("get", "pods", "--output=custom-columns=POD:.metadata.name,NODE:.spec.nodeName,PHASE:.status.phase"))
	if m, err := s.getModelQuietly("deepseek-r1-too-large"); err == nil {
		s.ui.println("\n  why deepseek-r1-too-large does not fit:\n    " + strings.ReplaceAll(m.condition("Planned").Message, "\n", "\n    "))
	}
	s.ui.println(fmt.Sprintf(`
Up after %s. The nodes are simulated: the pods are reported as running, and nothing computes in them.
A model that answers needs root (make up) or a cluster of your own (make up KUBECONFIG=...).

  export KUBECONFIG=%s PATH=%s:$PATH
  kubectl get mdep                                    models, their phase, and GPUs
  kubectl describe mdep deepseek-r1-too-large         for each group of nodes why it does not fit
  kubectl scale mdep deepseek-r1 --replicas=4         until the nodes are full
  kubelab simulate --prefix more --count 2            more nodes
  make down                                           stop and remove all of it
`, seconds(took), s.kubeconfig, s.bin))
}

func (s *session) getModelQuietly(name string) (*model, error) {
	b, err := s.kubectl("get", "mdep", name, "--output=json").Output()
	if err != nil {
		return nil, err
	}
	m := &model{}
	return m, json.Unmarshal(b, m)
}

func (s *session) stopLab() error {
	kubelab := filepath.Join(s.bin, "kubelab")
	if !isFile(kubelab) {
		if isFile(s.labFile("lab.json")) {
			return fmt.Errorf("a lab may run from %s, but %s is gone: make tools builds it again", s.lab, kubelab)
		}
		return nil
	}
	return s.exec(s.command(kubelab, "down"))
}
