package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// A program of the Go module e2e/kubelab. They share one module so that the Kubernetes client
// libraries, most of each of them, are compiled once.
type goTool struct{ name, pkg string }

var (
	kubelabTool = goTool{"kubelab", "."}
	corednsTool = goTool{"coredns", "./coredns"}
	kwokTool    = goTool{"kwok", "sigs.k8s.io/kwok/cmd/kwok"}
	helmTool    = goTool{"helm", "helm.sh/helm/v4/cmd/helm"}
	helm3Tool   = goTool{"helm3", "helm.sh/helm/v3/cmd/helm"}
	kubectlTool = goTool{"kubectl", "k8s.io/kubernetes/cmd/kubectl"}

	nodeTools         = []goTool{kubelabTool, corednsTool, kwokTool, helmTool}
	controlPlaneTools = []goTool{kubelabTool, kwokTool, helmTool}
	allTools          = []goTool{kubelabTool, corednsTool, kwokTool, helmTool, helm3Tool}
)

// The version that kubectl and the API server report; Helm and kubectl refuse to parse the default.
const versionPackage = "k8s.io/component-base/version"

func (s *session) toolsStep(tools []goTool) step {
	return step{
		name: "build Kubernetes and its tools",
		hint: "a download that failed: run make up again, it goes on where it stopped\n" +
			"\"no space left\" or \"signal: killed\": the build needs 6 GB of disk under $GOCACHE and 3 GB of memory",
		run: func() (string, error) { return s.buildTools(tools) },
	}
}

// buildTools builds what is not there or is older than its sources.
func (s *session) buildTools(tools []goTool) (string, error) {
	dir := s.repoFile("e2e/kubelab")
	goVersion, err := s.checkGo()
	if err != nil {
		return "", err
	}
	sources, err := hashTree(dir, goVersion)
	if err != nil {
		return "", err
	}
	var todo []goTool
	for _, t := range tools {
		if stamp, _ := os.ReadFile(filepath.Join(s.bin, "."+t.name+".built")); string(stamp) != sources || !isFile(filepath.Join(s.bin, t.name)) {
			todo = append(todo, t)
		}
	}
	if len(todo) == 0 {
		return "unchanged", s.linkKubectl(tools)
	}
	kubernetes, err := moduleVersion(filepath.Join(dir, "go.mod"), "k8s.io/kubernetes")
	if err != nil {
		return "", err
	}
	s.ui.say("looking at the packages")
	var packages []string
	for _, t := range todo {
		packages = append(packages, t.pkg)
	}
	list, err := s.output(s.goCommand(dir, append([]string{"list", "-trimpath", "-deps"}, packages...)...))
	if err != nil {
		return "", err
	}
	total := strings.Count(list, "\n") + 1
	for _, t := range todo { // the first compiles nearly all, the others mostly link
		c := s.goCommand(dir, "build", "-v", "-trimpath", "-ldflags", ldflags(kubernetes), "-o", filepath.Join(s.bin, t.name), t.pkg)
		if err := s.watched(c, func(compiled int) { s.ui.say("%s: compiled %d of at most %d packages", t.name, compiled, total) }, isPackage); err != nil {
			return "", err
		}
		if err := os.WriteFile(filepath.Join(s.bin, "."+t.name+".built"), []byte(sources), 0o644); err != nil {
			return "", err
		}
	}
	return fmt.Sprintf("Kubernetes %s, built: %s", kubernetes, toolNames(todo)), s.linkKubectl(tools)
}

// linkKubectl: kubelab is kubectl when it is called so.
func (s *session) linkKubectl(tools []goTool) error {
	for _, t := range tools {
		if t == kubelabTool {
			link := filepath.Join(s.bin, "kubectl")
			_ = os.Remove(link)
			return os.Symlink("kubelab", link)
		}
	}
	return nil
}

func toolNames(tools []goTool) string {
	var names []string
	for _, t := range tools {
		names = append(names, t.name)
	}
	return strings.Join(names, ", ")
}

func (s *session) goCommand(dir string, args ...string) *exec.Cmd {
	c := s.command("go", args...)
	c.Dir = dir
	c.Env = append(c.Env, "CGO_ENABLED=0", "GOWORK=off", "GOFLAGS="+strings.TrimSpace(os.Getenv("GOFLAGS")+" -buildvcs=false"))
	return c
}

func ldflags(version string) string {
	parts := strings.Split(strings.TrimPrefix(version, "v"), ".")
	return strings.Join([]string{
		"-s -w", "-X", versionPackage + ".gitVersion=" + version, "-X", versionPackage + ".gitMajor=" + parts[0],
		"-X", versionPackage + ".gitMinor=" + parts[1], "-X", versionPackage + ".gitTreeState=clean",
		"-X", versionPackage + ".gitCommit=unknown", "-X", versionPackage + ".buildDate=1970-01-01T00:00:00Z",
	}, " ")
}

// moduleVersion reads a requirement of a go.mod.
func moduleVersion(goMod, module string) (string, error) {
	b, err := os.ReadFile(goMod)
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) >= 2 && f[0] == module && strings.Count(f[1], ".") == 2 {
			return f[1], nil
		}
	}
	return "", fmt.Errorf("%s does not require %s", goMod, module)
}

// isPackage tells a line of "go build -v" that names a compiled package from messages.
func isPackage(line string) bool {
	return line != "" && !strings.ContainsAny(line, " :\t$")
}

func isCrate(line string) bool { return strings.HasPrefix(strings.TrimSpace(line), "Compiling ") }

// watched runs a command with its output in the step's log, and counts the lines that show progress.
func (s *session) watched(c *exec.Cmd, progress func(int), counts func(string) bool) error {
	fmt.Fprintf(s.log, "$ %s\n", strings.Join(c.Args, " "))
	w := &lineCounter{to: s.log, counts: counts, progress: progress}
	progress(0)
	c.Stdout, c.Stderr = w, w
	if err := c.Run(); err != nil {
		return commandError(c, err)
	}
	return nil
}

type lineCounter struct {
	to       io.Writer
	rest     []byte
	n        int
	counts   func(string) bool
	progress func(int)
}

func (w *lineCounter) Write(p []byte) (int, error) {
	w.rest = append(w.rest, p...)
	for {
		i := bytes.IndexByte(w.rest, '\n')
		if i < 0 {
			break
		}
		if w.counts(string(w.rest[:i])) {
			w.n++
			w.progress(w.n)
		}
		w.rest = w.rest[i+1:]
	}
	return w.to.Write(p)
}

func (s *session) cargoStep(packages ...string) step {
	return step{
		name: "build the " + strings.Join(packages, " and the "),
		hint: "run it by itself: cargo build --release -p " + strings.Join(packages, " -p "),
		run: func() (string, error) {
			args := []string{"build", "--release", "--locked", "--color", "never"}
			for _, p := range packages {
				args = append(args, "-p", p)
			}
			lock, err := os.ReadFile(s.repoFile("Cargo.lock"))
			if err != nil {
				return "", err
			}
			total := strings.Count(string(lock), "[[package]]")
			t, crates := time.Now(), 0
			err = s.watched(s.command("cargo", args...), func(n int) {
				crates = n
				if n > 0 {
					s.ui.say("crate %d of at most %d", n, total)
				}
			}, isCrate)
			if err != nil {
				return "", err
			}
			if crates == 0 && time.Since(t) < 5*time.Second {
				return "unchanged", nil
			}
			return fmt.Sprintf("%d crates", crates), nil
		},
	}
}

// binary is where cargo has put a program.
func (s *session) binary(name string) string {
	target := os.Getenv("CARGO_TARGET_DIR")
	if target == "" {
		target = "target"
	}
	if !filepath.IsAbs(target) {
		target = filepath.Join(s.root, target)
	}
	return filepath.Join(target, "release", name)
}

// hashTree is a digest of all files below dir (tests left out) and of what else matters.
func hashTree(dir string, more ...string) (string, error) {
	h := sha256.New()
	for _, m := range more {
		fmt.Fprintf(h, "%s\x00", m)
	}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || strings.HasSuffix(path, "_test.go") || strings.HasSuffix(path, ".md") {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		fmt.Fprintf(h, "%s\x00", rel)
		return hashFile(h, path)
	})
	return hex.EncodeToString(h.Sum(nil)), err
}

func hashFile(to io.Writer, path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	n, err := io.Copy(to, f)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(to, "%d\x00", n)
	return err
}
