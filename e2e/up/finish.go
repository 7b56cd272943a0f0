package main

import (
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"syscall"
	"time"
)

// printNext says what to try now.
func (s *session) printNext(took time.Duration) {
	base, forward := s.baseURL, ""
	if !isFile(s.labFile("node/kubelet.yaml")) || s.kubeconfig != s.labFile("admin.kubeconfig") {
		base = "http://127.0.0.1:8000/v1"
		forward = "\n  kubectl port-forward service/" + quickstartModel + " 8000:80     first, in another terminal"
	}
	down := "make down"
	path := s.bin + ":"
	if forward != "" {
		down = "make down KUBECONFIG=" + s.kubeconfig
		if !isFile(filepath.Join(s.bin, "kubectl")) {
			path = ""
		}
	}
	s.ui.println(fmt.Sprintf(`Up after %s. The model's base URL, reachable from this machine: %s

  export KUBECONFIG=%s PATH=%s$PATH%s
  kubectl get mdep,pods                          the model and its replicas
  kubectl describe mdep %s                  the plan, the conditions, the events
  kubectl scale mdep %s --replicas=2        one more replica

  curl -N %s/chat/completions -H 'content-type: application/json' \
    -d '{"model":"%s","stream":true,"messages":[{"role":"user","content":"How many r in \"strawberry\"?"}]}'

  from openai import OpenAI                      (pip install openai)
  client = OpenAI(base_url=%q, api_key="unused")
  stream = client.chat.completions.create(model=%q, stream=True,
      messages=[{"role": "user", "content": "What is 12 * 7?"}])
  for chunk in stream:
      if chunk.choices: print(chunk.choices[0].delta.content or "", end="")

  %s                                      stop and remove all of it
`, seconds(took), base, s.kubeconfig, path, forward, quickstartModel, quickstartModel, base, quickstartModel, base, quickstartModel, down))
}

// down stops everything that "up" started on this machine. Built things stay, so that the next up is fast.
func (s *session) down() error {
	return s.steps("cachalot: stopping",
		step{name: "stop the operator and Kubernetes", hint: "as root: sudo make down", run: func() (string, error) {
			if err := s.stopOperator(); err != nil {
				return "", err
			}
			if err := s.stopLab(); err != nil {
				return "", err
			}
			return "processes, mounts, bridge, cgroups and rules are gone", nil
		}},
		step{name: "remove its state", run: func() (string, error) {
			unmountBelow(s.labFile("images"))
			for _, name := range []string{"operator.kubeconfig", "helm", "images/store"} {
				if err := os.RemoveAll(s.labFile(name)); err != nil {
					return "", err
				}
			}
			return fmt.Sprintf("kept for the next make up: %s (rm -r %s removes that too)", "builds, images and logs", s.lab), nil
		}},
	)
}

// downCluster removes cachalot from somebody's cluster, but not the CRD: that would delete the models of
// everybody.
func (s *session) downCluster() error {
	return s.steps("cachalot: leaving the cluster of "+s.kubeconfig,
		step{name: "delete the model", run: func() (string, error) {
			return "", s.exec(s.kubectl("delete", "--ignore-not-found", "--filename", s.repoFile(quickstart)))
		}},
		step{name: "uninstall the operator", run: func() (string, error) {
			if err := s.helm("uninstall", "cachalot", "--namespace", systemNamespace, "--ignore-not-found", "--wait"); err != nil {
				return "", err
			}
			return "the CRD stays, with other models; helm uninstall cachalot-crds --namespace " + systemNamespace + " removes both", nil
		}},
	)
}

// unmountBelow removes mounts that an interrupted image build may have left, the deepest first.
func unmountBelow(dir string) {
	b, _ := os.ReadFile("/proc/self/mounts")
	var points []string
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 1 && strings.HasPrefix(f[1], dir+"/") {
			points = append(points, f[1])
		}
	}
	sort.Sort(sort.Reverse(sort.StringSlice(points)))
	for _, p := range points {
		_ = syscall.Unmount(p, syscall.MNT_DETACH)
	}
}
