// up is `make up` and `make down`: it takes a bare machine to a model that answers, one step after the
// other, and back. Each step says what it does and how long it took; a step that fails says what failed,
// why, and where its log is. Every step may run again and skips what is already done.
//
// It uses nothing but Go's standard library, because it runs before anything else is there.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"
)

const usage = `usage: up [flags] up|down|images|tools

  up       from this machine as it is to a model that answers
  down     stop and remove all of it
  images   build the two images
  tools    build the test tools (Kubernetes, CoreDNS, KWOK, Helm 4 and 3) into .lab/bin

flags (make sets them):
`

type options struct {
	root       string // of the repository
	mode       string
	kubeconfig string
	registry   string
	tag        string
}

const (
	modeNode         = "node"
	modeControlPlane = "control-plane"
)

func main() {
	o := options{}
	flag.StringVar(&o.root, "root", ".", "root of the repository")
	flag.StringVar(&o.mode, "mode", modeNode, "node: a real node on this machine (root); control-plane: simulated nodes only")
	flag.StringVar(&o.kubeconfig, "kubeconfig", "", "use this cluster instead of one on this machine")
	flag.StringVar(&o.registry, "registry", "", "with --kubeconfig: where the cluster pulls cachalot-operator and cachalot-engine from")
	flag.StringVar(&o.tag, "tag", "dev", "with --kubeconfig: tag of the images")
	flag.Usage = func() { fmt.Fprint(os.Stderr, usage); flag.PrintDefaults() }
	flag.Parse()
	if flag.NArg() != 1 {
		flag.Usage()
		os.Exit(2)
	}
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer cancel()
	if err := run(ctx, o, flag.Arg(0)); err != nil {
		var f *failure
		if !errors.As(err, &f) { // a failure was explained when it happened
			fmt.Fprintln(os.Stderr, "cachalot:", err)
		}
		os.Exit(1)
	}
}

func run(ctx context.Context, o options, command string) error {
	root, err := filepath.Abs(o.root)
	if err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(root, "e2e", "up")); err != nil {
		return fmt.Errorf("%s is not the root of the repository: run make there", root)
	}
	o.root = root
	s, err := newSession(ctx, o)
	if err != nil {
		return err
	}
	switch command {
	case "up":
		if o.kubeconfig != "" {
			return s.upCluster()
		}
		switch o.mode {
		case modeNode:
			return s.upNode()
		case modeControlPlane:
			return s.upControlPlane()
		}
		return fmt.Errorf("MODE=%s is not known: use MODE=node (the default) or MODE=control-plane", o.mode)
	case "down":
		if o.kubeconfig != "" {
			return s.downCluster()
		}
		return s.down()
	case "images":
		return s.steps("cachalot: both images", s.checkMachineStep(), s.packagesStep(imagePackages), s.cargoStep("operator", "engine"), s.imagesStep())
	case "tools":
		return s.steps("cachalot: test tools in .lab/bin", s.checkGoStep(), s.toolsStep(allTools))
	}
	return fmt.Errorf("%q is not known: use up, down, images or tools", command)
}

// upNode is the whole way, on this machine.
func (s *session) upNode() error {
	start := time.Now()
	if os.Geteuid() != 0 {
		return errors.New(needsRoot)
	}
	err := s.steps("cachalot: a model on a real Kubernetes, on this machine",
		s.checkMachineStep(),
		s.packagesStep(nodePackages, imagePackages),
		s.toolsStep(nodeTools),
		s.cargoStep("operator", "engine"),
		s.labStep(true),
		s.imagesStep(),
		s.importStep(),
		s.helmStep(),
		s.modelStep(),
		s.askStep(),
	)
	if err != nil {
		return err
	}
	s.printNext(time.Since(start))
	return nil
}

const needsRoot = `a real node on this machine needs root: containerd and runc make mounts, network namespaces and cgroups,
apt-get installs what is missing. Either

  sudo env "PATH=$PATH" make up      with a real node, and a model that answers
  make up MODE=control-plane         without root: the control plane with simulated GPU nodes; you see how the
                                     operator plans and places models, but pods on simulated nodes do not compute
  make up KUBECONFIG=... [IMAGE_REGISTRY=...]   on a cluster of your own`

// upControlPlane needs no root: nothing computes, but all of the operator works.
func (s *session) upControlPlane() error {
	start := time.Now()
	err := s.steps("cachalot: the operator on a real control plane with simulated GPU nodes",
		s.checkMachineStep(),
		s.toolsStep(controlPlaneTools),
		s.cargoStep("operator"),
		s.labStep(false),
		s.simulateStep(),
		s.operatorProcessStep(),
		s.fleetStep(),
	)
	if err != nil {
		return err
	}
	s.printFleet(time.Since(start))
	return nil
}

// upCluster uses somebody else's cluster: nothing is built but what is needed to talk to it.
func (s *session) upCluster() error {
	start := time.Now()
	if _, err := os.Stat(s.kubeconfig); err != nil {
		return fmt.Errorf("KUBECONFIG: %w", err)
	}
	err := s.steps("cachalot: a model on the cluster of "+s.kubeconfig,
		s.clientToolsStep(),
		s.helmStep(),
		s.modelStep(),
		s.askStep(),
	)
	if err != nil {
		return err
	}
	s.printNext(time.Since(start))
	return nil
}
