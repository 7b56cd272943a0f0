package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"
)

const (
	systemNamespace = "cachalot-system"
	quickstart      = "docs/guide/quickstart.yaml"
	quickstartModel = "tiny-r1"
)

// labStep starts the lab, or keeps the one that runs when it is of the wanted kind.
func (s *session) labStep(withNode bool) step {
	return step{
		name: "start Kubernetes",
		hint: "make down removes what an earlier run has left; then make up again",
		run: func() (string, error) {
			kubelab := s.tool("kubelab")
			if s.output2("is it there?", kubelab, "status") == nil {
				if isFile(s.labFile("node/kubelet.yaml")) == withNode {
					return "runs already", nil
				}
				s.ui.say("stopping the lab of the other mode")
				if err := s.stopLab(); err != nil {
					return "", err
				}
			}
			args := []string{"up", "--detach"}
			if withNode {
				args = append(args, "--node", "--egress") // egress: models may come from the outside
			}
			t := time.Now()
			out, err := s.output(s.command(kubelab, args...))
			fmt.Fprintln(s.log, out)
			if err != nil {
				return "", fmt.Errorf("%w\n%s", err, out)
			}
			return fmt.Sprintf("ready in %.1f s, state in %s", time.Since(t).Seconds(), s.lab), nil
		},
	}
}

// output2 runs a command of which only success matters.
func (s *session) output2(why string, program string, args ...string) error {
	fmt.Fprintf(s.log, "# %s\n", why)
	return s.exec(s.command(program, args...))
}

// clientToolsStep: kubectl and Helm from $PATH, else built here.
func (s *session) clientToolsStep() step {
	return step{name: "find or build kubectl and Helm", run: func() (string, error) {
		var build []goTool
		for _, t := range []goTool{kubectlTool, helmTool} {
			if !have(t.name) && !isFile(s.tool(t.name)) {
				build = append(build, t)
			}
		}
		if len(build) > 0 {
			if _, err := s.buildTools(build); err != nil {
				return "", err
			}
		}
		version, err := s.output(s.kubectl("version", "--output=json", "--request-timeout=10s"))
		if err != nil {
			return "", fmt.Errorf("the cluster does not answer: %w", err)
		}
		var v struct{ ServerVersion struct{ GitVersion string } }
		if err := json.Unmarshal([]byte(version), &v); err != nil {
			return "", err
		}
		return "the cluster is Kubernetes " + v.ServerVersion.GitVersion, nil
	}}
}

func (s *session) helm(args ...string) error {
	c := s.command(s.tool("helm"), args...)
	for _, k := range []string{"CACHE", "CONFIG", "DATA"} { // nothing in the home folder
		c.Env = append(c.Env, "HELM_"+k+"_HOME="+filepath.Join(s.lab, "helm", strings.ToLower(k)))
	}
	return s.exec(c)
}

func (s *session) helmStep() step {
	return step{
		name: "install the charts with Helm",
		hint: "kubectl --namespace " + systemNamespace + " get pods,events shows what the operator's pod is waiting for",
		run: func() (string, error) {
			s.ui.say("cachalot-crds")
			if err := s.installCRDs(); err != nil {
				return "", err
			}
			s.ui.say("cachalot")
			args := append([]string{"upgrade", "--install", "cachalot", s.repoFile("charts/cachalot"),
				"--namespace", systemNamespace, "--timeout", "2m"}, s.imageValues()...)
			err := s.helm(args...)
			if err == nil {
				err = s.waitOperator()
			}
			if err != nil {
				s.collect("--namespace", systemNamespace, "get", "pods,events")
				s.collect("--namespace", systemNamespace, "logs", "deployment/cachalot", "--tail=20")
				return "", err
			}
			return "cachalot-crds and cachalot, in namespace " + systemNamespace, nil
		},
	}
}

func (s *session) installCRDs() error {
	return s.helm("upgrade", "--install", "cachalot-crds", s.repoFile("charts/cachalot-crds"),
		"--namespace", systemNamespace, "--create-namespace", "--wait", "--timeout", "2m")
}

// imageValues names the images: those built here by content, or those of a registry by tag.
func (s *session) imageValues() []string {
	var args []string
	set := func(key, repository, tag, policy string) {
		for k, v := range map[string]string{"repository": repository, "tag": tag, "pullPolicy": policy} {
			args = append(args, "--set-string", key+"."+k+"="+v)
		}
	}
	keys := map[string]string{"cachalot-operator": "image", "cachalot-engine": "engine.image"}
	for _, i := range s.images {
		set(keys[i.name], "localhost/"+i.name, i.tag, "Never")
	}
	if len(s.images) == 0 {
		registry := strings.TrimSuffix(s.registry, "/")
		if registry == "" {
			registry = "localhost"
		}
		for name, key := range keys {
			set(key, registry+"/"+name, s.tag, "IfNotPresent")
		}
	}
	return args
}

const operatorTimeout = 3 * time.Minute

// waitOperator shows what the operator's pod waits for, and gives up early on what will not get better.
func (s *session) waitOperator() error {
	last := ""
	for end := time.Now().Add(operatorTimeout); time.Now().Before(end); {
		done, status, err := s.operatorState()
		if s.ctx.Err() != nil {
			return s.ctx.Err()
		}
		if err != nil || done {
			return err
		}
		last = status
		s.ui.say("operator: %s", status)
		time.Sleep(200 * time.Millisecond)
	}
	return fmt.Errorf("the operator is not available after %s: %s", seconds(operatorTimeout), last)
}

func (s *session) operatorState() (done bool, status string, err error) {
	out, err := s.kubectl("--namespace", systemNamespace, "get", "deployment/cachalot", "--output=json", "--request-timeout=10s").Output()
	if err != nil {
		return false, "", fmt.Errorf("deployment/cachalot: %w", err)
	}
	var d struct {
		Metadata struct{ Generation int64 }
		Spec     struct{ Replicas int }
		Status   struct {
			ObservedGeneration                           int64
			Replicas, UpdatedReplicas, AvailableReplicas int
		}
	}
	if err := json.Unmarshal(out, &d); err != nil {
		return false, "", err
	}
	st := d.Status
	if st.ObservedGeneration == d.Metadata.Generation && st.UpdatedReplicas == d.Spec.Replicas && st.AvailableReplicas == d.Spec.Replicas && st.Replicas == d.Spec.Replicas {
		return true, "", nil
	}
	out, err = s.kubectl("--namespace", systemNamespace, "get", "pods", "--selector=app.kubernetes.io/instance=cachalot", "--output=json", "--request-timeout=10s").Output()
	if err != nil {
		return false, "", err
	}
	status, err = podTrouble(out)
	return false, fmt.Sprintf("%d of %d available%s", st.AvailableReplicas, d.Spec.Replicas, status), err
}

const hopelessRestarts = 3

// podTrouble finds why containers wait; an error means that waiting longer will not help.
func podTrouble(pods []byte) (string, error) {
	var list struct {
		Items []struct {
			Metadata struct{ Name string }
			Status   struct {
				ContainerStatuses []struct {
					RestartCount int
					State        struct {
						Waiting *struct{ Reason, Message string }
					}
				}
			}
		}
	}
	if err := json.Unmarshal(pods, &list); err != nil {
		return "", err
	}
	text := ""
	for _, p := range list.Items {
		for _, c := range p.Status.ContainerStatuses {
			w := c.State.Waiting
			if w == nil || w.Reason == "ContainerCreating" {
				continue
			}
			text = ", " + w.Reason
			hopeless := w.Reason == "ErrImageNeverPull" || w.Reason == "InvalidImageName" || w.Reason == "CreateContainerConfigError"
			if hopeless || c.RestartCount >= hopelessRestarts {
				return text, fmt.Errorf("pod %s: %s (%d restarts) %s", p.Metadata.Name, w.Reason, c.RestartCount, firstLine(w.Message, 300))
			}
		}
	}
	return text, nil
}

// collect adds what kubectl says to the step's log; the log is what a failure shows.
func (s *session) collect(args ...string) {
	_ = s.exec(s.kubectl(append(args, "--request-timeout=10s")...))
}

// model is the part of a ModelDeployment that is shown.
type model struct {
	Metadata struct {
		Name       string
		Generation int64
	}
	Status struct {
		ObservedGeneration int64
		Phase              string
		Ready              string
		Message            string
		Endpoint           string
		Load               *struct {
			Phase                                   string
			BytesLoaded, BytesTotal, BytesPerSecond float64
			ETASeconds                              *float64 `json:"etaSeconds"`
			Percent                                 int
		}
		Conditions []condition
	}
}

type condition struct {
	Type, Status, Reason, Message string
}

func (m *model) condition(kind string) condition {
	for _, c := range m.Status.Conditions {
		if c.Type == kind {
			return c
		}
	}
	return condition{Type: kind, Status: "Unknown"}
}

// current tells whether the status speaks of the spec as it is.
func (m *model) current() bool { return m.Status.ObservedGeneration == m.Metadata.Generation }

// progress is one line about where the model is.
func (m *model) progress() string {
	if m.Status.Phase == "" {
		return "waiting for the operator"
	}
	line := m.Status.Phase
	if l := m.Status.Load; l != nil {
		line += fmt.Sprintf(": %s %d %%, %s of %s", l.Phase, l.Percent, bytesText(l.BytesLoaded), bytesText(l.BytesTotal))
		if l.BytesPerSecond > 0 {
			line += fmt.Sprintf(", %s/s", bytesText(l.BytesPerSecond))
		}
		if l.ETASeconds != nil {
			line += fmt.Sprintf(", %.0f s left", *l.ETASeconds)
		}
		return line
	}
	if m.Status.Message != "" {
		line += ": " + firstLine(m.Status.Message, 110)
	}
	return line
}

func firstLine(text string, most int) string {
	line, _, _ := strings.Cut(text, "\n")
	if r := []rune(line); len(r) > most {
		return string(r[:most-1]) + "…"
	}
	return line
}

func bytesText(b float64) string {
	for _, u := range []struct {
		size float64
		name string
	}{{1e12, "TB"}, {1e9, "GB"}, {1e6, "MB"}, {1e3, "kB"}} {
		if b >= u.size {
			return fmt.Sprintf("%.1f %s", b/u.size, u.name)
		}
	}
	return fmt.Sprintf("%.0f B", b)
}

func (s *session) getModel(name string) (*model, error) {
	out, err := s.output(s.kubectl("get", "mdep", name, "--output=json", "--request-timeout=10s"))
	if err != nil {
		return nil, err
	}
	m := &model{}
	return m, json.Unmarshal([]byte(out), m)
}

const (
	readyTimeout = 5 * time.Minute
	// A phase Failed that stays this long is believed; it may be left from before.
	failedPatience = 15 * time.Second
)

// modelStep applies the quick start and shows how the model comes up.
func (s *session) modelStep() step {
	return step{
		name: "serve the model " + quickstartModel,
		hint: "kubectl describe mdep " + quickstartModel + "   (with KUBECONFIG=" + s.kubeconfig + ")",
		run: func() (string, error) {
			t := time.Now()
			if err := s.exec(s.kubectl("apply", "--filename", s.repoFile(quickstart))); err != nil {
				return "", err
			}
			if err := s.waitModel(quickstartModel); err != nil {
				s.collect("describe", "mdep", quickstartModel)
				s.collect("get", "pods,events", "--output=wide")
				s.collect("logs", "--selector=cachalot.dev/model-deployment="+quickstartModel, "--tail=20")
				s.collect("--namespace", systemNamespace, "logs", "deployment/cachalot", "--tail=30")
				return "", err
			}
			return fmt.Sprintf("Ready %.1f s after it was applied", time.Since(t).Seconds()), nil
		},
	}
}

func (s *session) waitModel(name string) error {
	var failedSince time.Time
	last := "no status yet"
	for end := time.Now().Add(readyTimeout); time.Now().Before(end); {
		m, err := s.getModel(name)
		if err != nil && s.ctx.Err() != nil {
			return s.ctx.Err()
		}
		if err == nil {
			last = m.progress()
			s.ui.say("%s", last)
			if m.current() && m.condition("Ready").Status == "True" && s.runsOurImage(name) {
				return nil
			}
			if m.Status.Phase != "Failed" || !m.current() {
				failedSince = time.Time{}
			} else if failedSince.IsZero() {
				failedSince = time.Now()
			} else if time.Since(failedSince) > failedPatience {
				return errors.New(last)
			}
		}
		select {
		case <-s.ctx.Done():
			return s.ctx.Err()
		case <-time.After(300 * time.Millisecond):
		}
	}
	return fmt.Errorf("not Ready after %s; %s", seconds(readyTimeout), last)
}

// runsOurImage: after a rebuild the model is Ready on the old image for a moment.
func (s *session) runsOurImage(name string) bool {
	want := ""
	for _, i := range s.images {
		if i.name == "cachalot-engine" {
			want = i.ref(i.tag)
		}
	}
	if want == "" {
		return true
	}
	images, err := s.output(s.kubectl("get", "pods", "--selector=cachalot.dev/model-deployment="+name+",cachalot.dev/component=engine",
		"--output=jsonpath={.items[*].spec.containers[0].image}"))
	if err != nil {
		return false
	}
	for _, image := range strings.Fields(images) {
		if image != want {
			s.ui.say("replacing replicas of the previous build")
			return false
		}
	}
	return images != ""
}

// freeAddress is a loopback address with a port that nobody has.
func freeAddress() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	return l.Addr().String(), nil
}

func writeFile(path string, data []byte) error { return os.WriteFile(path, data, 0o600) }
