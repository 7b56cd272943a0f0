package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"time"
)

// supervisor runs the components as children and starts a dead one again once the lab is up.
//
// All children are started from one OS thread (the main goroutine is locked to it), because the
// kernel binds "kill me when my parent ends" to the thread that forked: whatever happens to the
// supervisor, SIGKILL included, no component outlives it.
type supervisor struct {
	*lab
	ctx     context.Context // ends at SIGINT or SIGTERM
	node    *node
	procs   []*process
	exits   chan exit
	started uint64
	out     *os.File
}

type process struct {
	name, bin string
	args      []string
	cmd       *exec.Cmd
	done      chan struct{}
	deaths    []time.Time
	restarts  int
	ending    bool // it was told to stop
}

type exit struct {
	*process
	err error
}

const (
	restartLimit  = 5
	restartWindow = time.Minute
)

func newSupervisor(ctx context.Context, l *lab) (*supervisor, error) {
	started, ok := processStart(os.Getpid())
	if !ok {
		return nil, errors.New("/proc is not mounted")
	}
	return &supervisor{lab: l, ctx: ctx, exits: make(chan exit, 64), started: started, out: os.Stdout}, nil
}

func (s *supervisor) say(format string, args ...any) { fmt.Fprintf(s.out, format+"\n", args...) }

// start runs a component of this binary.
func (s *supervisor) start(name string, args ...string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	return s.startProgram(name, self, append([]string{name}, args...)...)
}

// startProgram runs a program as a component. argv[0] is the component's name, because client-go takes
// the user agent and the field manager from it.
func (s *supervisor) startProgram(name, bin string, args ...string) error {
	p := &process{name: name, bin: bin, args: args}
	s.procs = append(s.procs, p)
	return s.launch(p)
}

func (s *supervisor) launch(p *process) error {
	mode := os.O_CREATE | os.O_WRONLY | os.O_TRUNC
	if p.restarts > 0 {
		mode = os.O_CREATE | os.O_WRONLY | os.O_APPEND
	}
	log, err := os.OpenFile(s.log(p.name), mode, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	c := exec.Command(p.bin, p.args...)
	c.Args[0] = p.name
	c.Stdout, c.Stderr = log, log
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	if err := c.Start(); err != nil {
		return fmt.Errorf("%s: %w", p.name, err)
	}
	done := make(chan struct{})
	p.cmd, p.done = c, done
	go func() {
		err := c.Wait()
		close(done)
		s.exits <- exit{p, err}
	}()
	return s.save()
}

// save writes lab.json.
func (s *supervisor) save() error {
	st := labState{PID: os.Getpid(), Started: s.started, URL: s.url(), Processes: []processState{}}
	if s.node != nil && s.node.changed {
		st.Node = &s.node.nodeState
	}
	for _, p := range s.procs {
		st.Processes = append(st.Processes, processState{p.name, p.cmd.Process.Pid, p.restarts})
	}
	b, err := json.MarshalIndent(st, "", "  ")
	if err != nil {
		return err
	}
	return writeFile(s.path("lab.json"), b)
}

func (s *supervisor) died(e exit) error {
	return fmt.Errorf("%s ended (%v); the last lines of %s:\n%s", e.name, e.err, s.log(e.name), tail(s.log(e.name), 6))
}

// restart starts a dead component again, unless it keeps dying.
func (s *supervisor) restart(e exit) error {
	now := time.Now()
	recent := e.deaths[:0]
	for _, t := range e.deaths {
		if now.Sub(t) < restartWindow {
			recent = append(recent, t)
		}
	}
	e.deaths = append(recent, now)
	if len(e.deaths) > restartLimit {
		return fmt.Errorf("gave up after %d restarts within %s: %w", restartLimit, restartWindow, s.died(e))
	}
	s.say("%s ended (%v): starting it again", e.name, e.err)
	time.Sleep(time.Duration(len(e.deaths)-1) * time.Second)
	e.restarts++
	return s.launch(e.process)
}

// waitFor polls until ok is true, or until a component dies or time is up.
func (s *supervisor) waitFor(what string, limit time.Duration, ok func(context.Context) bool) error {
	ctx, cancel := context.WithTimeout(s.ctx, limit)
	defer cancel()
	for !ok(ctx) {
		select {
		case e := <-s.exits:
			return fmt.Errorf("waiting for %s: %w", what, s.died(e))
		case <-ctx.Done():
			if s.ctx.Err() != nil {
				return errors.New("stopped by a signal")
			}
			return fmt.Errorf("waiting for %s: not there after %s; logs are in %s", what, limit, s.path("logs"))
		case <-time.After(100 * time.Millisecond):
		}
	}
	return nil
}

// end stops one component and waits until it is gone.
func (s *supervisor) end(name string) {
	for _, p := range s.procs {
		if p.name != name || p.cmd == nil {
			continue
		}
		p.ending = true
		_ = p.cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-p.done:
		case <-time.After(3 * time.Second):
			_ = p.cmd.Process.Kill()
			<-p.done
		}
	}
}

// stop ends all components, the youngest first. Nothing in a lab is worth a slow stop: who has not
// ended by itself soon is killed.
func (s *supervisor) stop() {
	for i := len(s.procs) - 1; i >= 0; i-- {
		s.procs[i].ending = true
		_ = s.procs[i].cmd.Process.Signal(syscall.SIGTERM)
	}
	limit, cancel := context.WithTimeout(context.Background(), 500*time.Millisecond)
	defer cancel()
	for _, p := range s.procs {
		select {
		case <-p.done:
		case <-limit.Done():
		}
		_ = p.cmd.Process.Kill()
		<-p.done
	}
}
