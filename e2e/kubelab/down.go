package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
)

func downCommand(dir *string) *cobra.Command {
	return &cobra.Command{
		Use: "down", Short: "stop the lab and remove every trace of it", Args: cobra.NoArgs,
		Long: `Stop the lab: pods, components, mounts, bridge, nftables tables, cgroups, changed sysctls, state.
It also cleans up after a lab that was killed. Logs stay in <dir>/logs. Stopping twice is no error.`,
		RunE: func(*cobra.Command, []string) error { return down(*dir) },
	}
}

func down(dir string) error {
	runtime.LockOSThread() // cleanUpCrash may start a containerd; see supervisor
	l, err := openLab(dir)
	if err != nil {
		return err
	}
	s, err := l.state()
	if err != nil {
		return err
	}
	if s == nil {
		fmt.Println("no lab in", l.dir)
		return nil
	}
	t := time.Now()
	if s.alive() {
		if err := syscall.Kill(s.PID, syscall.SIGTERM); err != nil {
			return fmt.Errorf("stopping the lab (pid %d): %w; the user who started it must stop it", s.PID, err)
		}
		if !waitGone(s, 90*time.Second) {
			fmt.Fprintf(os.Stderr, "kubelab: pid %d did not stop within 90 s: killing it\n", s.PID)
			_ = syscall.Kill(s.PID, syscall.SIGKILL)
			waitGone(s, 5*time.Second)
		}
	}
	if err := l.cleanUpCrash(); err != nil {
		return err
	}
	fmt.Printf("down after %.1f s; logs stay in %s\n", time.Since(t).Seconds(), l.path("logs"))
	return nil
}

func waitGone(s *labState, limit time.Duration) bool {
	for end := time.Now().Add(limit); s.alive(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			return false
		}
	}
	return true
}

// cleanUpCrash undoes what a killed lab left. Its components died with it; its pods did not.
func (l *lab) cleanUpCrash() error {
	s, err := l.state()
	if err != nil {
		return err
	}
	if s != nil && s.Node != nil {
		if os.Geteuid() != 0 {
			return fmt.Errorf("%s holds what is left of a real node: cleaning up needs root", l.dir)
		}
		if err := l.cleanUpNode(*s.Node); err != nil {
			return err
		}
	}
	return l.clear()
}

func (l *lab) cleanUpNode(state nodeState) error {
	v, err := newSupervisor(context.Background(), l)
	if err != nil {
		return err
	}
	n := &node{supervisor: v, dir: l.path("node"), nodeState: state, changed: true}
	v.node = n
	defer v.stop()
	return n.stopAfterCrash()
}

func statusCommand(dir *string) *cobra.Command {
	return &cobra.Command{
		Use: "status", Short: "what runs, with pids and restarts", Args: cobra.NoArgs,
		Long: `What runs, with pids and restarts. The exit status is 0 while the lab can be used. A component
that is killed comes back by itself, which is how tests restart an API server.`,
		RunE: func(*cobra.Command, []string) error {
			l, err := openLab(*dir)
			if err != nil {
				return err
			}
			s, err := l.running()
			if err != nil {
				return err
			}
			w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
			fmt.Fprintf(w, "COMPONENT\tPID\tRESTARTS\tLOG\n")
			fmt.Fprintf(w, "kubelab\t%d\t0\t%s\n", s.PID, filepath.Join("logs", "kubelab.log"))
			for _, p := range s.Processes {
				fmt.Fprintf(w, "%s\t%d\t%d\t%s\n", p.Name, p.PID, p.Restarts, filepath.Join("logs", p.Name+".log"))
			}
			if err := w.Flush(); err != nil {
				return err
			}
			fmt.Printf("\nAPI server %s, state in %s\n", s.URL, l.dir)
			if !isFile(l.path("ready")) {
				return fmt.Errorf("the lab is still starting or is stopping")
			}
			return nil
		},
	}
}
