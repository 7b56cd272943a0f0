package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
)

// session is one run: where things are, and what the steps share.
type session struct {
	options
	ctx     context.Context
	lab     string // .lab
	bin     string // .lab/bin
	logs    string // one file for each step
	ui      *ui
	log     *os.File // of the running step
	images  []image  // set by imagesStep
	baseURL string   // set by askStep
	forward *exec.Cmd
}

type step struct {
	name string
	// run does the work; its result is shown behind the name.
	run func() (result string, err error)
	// hint is what to try when it fails.
	hint string
}

// failure is an error that the user has seen.
type failure struct{ error }

func newSession(ctx context.Context, o options) (*session, error) {
	lab := filepath.Join(o.root, ".lab")
	s := &session{options: o, ctx: ctx, lab: lab, bin: filepath.Join(lab, "bin"), logs: filepath.Join(lab, "logs", "up"), ui: newUI(os.Stdout)}
	if s.kubeconfig == "" {
		s.kubeconfig = filepath.Join(lab, "admin.kubeconfig")
	} else if abs, err := filepath.Abs(s.kubeconfig); err == nil {
		s.kubeconfig = abs
	}
	for _, d := range []string{s.bin, s.logs} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return nil, err
		}
	}
	return s, nil
}

func (s *session) labFile(name string) string  { return filepath.Join(s.lab, name) }
func (s *session) repoFile(name string) string { return filepath.Join(s.root, name) }

// steps runs them in order and stops at the first that fails.
func (s *session) steps(title string, steps ...step) error {
	s.ui.println(title + "\n")
	for i, st := range steps {
		path := filepath.Join(s.logs, fmt.Sprintf("%02d-%s.log", i+1, slug(st.name)))
		f, err := os.Create(path)
		if err != nil {
			return fmt.Errorf("no log can be written: %w", err)
		}
		s.log = f
		s.ui.begin(fmt.Sprintf("%2d/%d  %s", i+1, len(steps), st.name))
		result, err := st.run()
		f.Close()
		if s.ctx.Err() != nil {
			s.ui.end("interrupted")
			s.ui.println("\nInterrupted. make up goes on where it stopped; make down removes what is there.")
			return &failure{s.ctx.Err()}
		}
		if err != nil {
			s.ui.end("FAILED")
			s.ui.println(explain(st, err, path))
			return &failure{err}
		}
		s.ui.end(result)
	}
	return nil
}

// explain says what failed, why, and where to look.
func explain(st step, err error, log string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "\nFailed:  %s\nWhy:     %s\n", st.name, strings.ReplaceAll(err.Error(), "\n", "\n         "))
	if last := tail(log, 12); last != "" {
		fmt.Fprintf(&b, "Log:     %s, which ends with\n%s\n", log, last)
	}
	if st.hint != "" {
		fmt.Fprintf(&b, "Way out: %s\n", strings.ReplaceAll(st.hint, "\n", "\n         "))
	}
	return b.String()
}

func slug(name string) string {
	return strings.Trim(strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' {
			return r
		}
		return '-'
	}, strings.ToLower(strings.Join(strings.FieldsFunc(name, func(r rune) bool { return r == ' ' || r == ',' }), "-"))), "-")
}

// tail returns the last lines of a log, indented.
func tail(path string, lines int) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	text := strings.TrimSpace(string(b))
	if text == "" {
		return ""
	}
	all := strings.Split(text, "\n")
	return "           " + strings.Join(all[max(0, len(all)-lines):], "\n           ")
}

// command is a child that dies with this program, with all it started, when the user interrupts.
func (s *session) command(name string, args ...string) *exec.Cmd {
	c := exec.CommandContext(s.ctx, name, args...)
	c.Dir = s.root
	c.Env = append(os.Environ(), "KUBECONFIG="+s.kubeconfig, "KUBELAB_DIR="+s.lab)
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	c.Cancel = func() error { return syscall.Kill(-c.Process.Pid, syscall.SIGTERM) }
	c.WaitDelay = 10 * time.Second
	return c
}

// exec runs a command with its output in the step's log.
func (s *session) exec(c *exec.Cmd) error {
	fmt.Fprintf(s.log, "$ %s\n", strings.Join(c.Args, " "))
	c.Stdout, c.Stderr = s.log, s.log
	if err := c.Run(); err != nil {
		return commandError(c, err)
	}
	return nil
}

// output runs a command and returns what it printed; messages go to the step's log.
func (s *session) output(c *exec.Cmd) (string, error) {
	fmt.Fprintf(s.log, "$ %s\n", strings.Join(c.Args, " "))
	var out, messages bytes.Buffer
	c.Stdout, c.Stderr = &out, io.MultiWriter(&messages, s.log)
	err := c.Run()
	if err != nil {
		if m := strings.TrimSpace(messages.String()); m != "" {
			return "", fmt.Errorf("%w: %s", commandError(c, err), m)
		}
		return "", commandError(c, err)
	}
	return strings.TrimSpace(out.String()), nil
}

func commandError(c *exec.Cmd, err error) error {
	var missing *exec.Error
	if errors.As(err, &missing) {
		return fmt.Errorf("%s is not there: %w", missing.Name, missing.Err)
	}
	what := filepath.Base(c.Path)
	if len(c.Args) > 1 && !strings.HasPrefix(c.Args[1], "-") {
		what += " " + c.Args[1]
	}
	return fmt.Errorf("%s ended with %w", what, err)
}

func (s *session) kubectl(args ...string) *exec.Cmd { return s.command(s.tool("kubectl"), args...) }

// tool prefers the one that was built here.
func (s *session) tool(name string) string {
	if p := filepath.Join(s.bin, name); isFile(p) {
		return p
	}
	return name
}

func isFile(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.Mode().IsRegular()
}

// ui shows the running step. On a terminal it rewrites one line; elsewhere it adds a line now and then.
type ui struct {
	out      io.Writer
	terminal bool
	mu       sync.Mutex
	title    string
	status   string
	shown    string
	started  time.Time
	lastLine time.Time
	stop     chan struct{}
}

// quiet is how long a log without a terminal stays silent.
const quiet = 15 * time.Second

func newUI(f *os.File) *ui {
	st, err := f.Stat()
	return &ui{out: f, terminal: err == nil && st.Mode()&os.ModeCharDevice != 0 && os.Getenv("TERM") != "dumb"}
}

func (u *ui) println(text string) { fmt.Fprintln(u.out, text) }

func (u *ui) begin(title string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.title, u.status, u.shown, u.started, u.lastLine, u.stop = title, "", "", time.Now(), time.Now(), make(chan struct{})
	go u.tick(u.stop)
}

func (u *ui) tick(stop chan struct{}) {
	for {
		u.draw()
		select {
		case <-stop:
			return
		case <-time.After(200 * time.Millisecond):
		}
	}
}

func (u *ui) draw() {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.stop == nil {
		return
	}
	elapsed := time.Since(u.started)
	if u.terminal {
		fmt.Fprintf(u.out, "\r\033[K%s … %s %s", u.title, seconds(elapsed), u.status)
	} else if time.Since(u.lastLine) >= quiet && u.status != u.shown {
		fmt.Fprintf(u.out, "%s … %s %s\n", u.title, seconds(elapsed), u.status)
		u.lastLine, u.shown = time.Now(), u.status
	}
}

// say changes what is shown behind the running step.
func (u *ui) say(format string, args ...any) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.status = fmt.Sprintf(format, args...)
}

func (u *ui) end(result string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.stop == nil {
		return
	}
	close(u.stop)
	u.stop = nil
	if u.terminal {
		fmt.Fprint(u.out, "\r\033[K")
	}
	fmt.Fprintf(u.out, "%-52s %8s  %s\n", u.title, seconds(time.Since(u.started)), result)
}

// seconds prints a duration as people say it.
func seconds(d time.Duration) string {
	if d < time.Minute {
		return fmt.Sprintf("%.1f s", d.Seconds())
	}
	return fmt.Sprintf("%d min %02d s", int(d.Minutes()), int(d.Seconds())%60)
}
