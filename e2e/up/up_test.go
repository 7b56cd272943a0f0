package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestAStreamedAnswerIsPutTogetherAndMeasured(t *testing.T) {
	var request map[string]any
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/v1/models" {
			fmt.Fprint(w, `{"object":"list","data":[{"id":"tiny"}]}`)
			return
		}
		if err := json.NewDecoder(r.Body).Decode(&request); err != nil {
			t.Error(err)
		}
		time.Sleep(30 * time.Millisecond)
		for _, event := range []string{
			`{"choices":[{"delta":{"role":"assistant"}}]}`,
			`{"choices":[{"delta":{"reasoning_content":"1 + 2"}}]}`,
			`{"choices":[{"delta":{"content":"\\boxed{"}}]}`,
			`{"choices":[{"delta":{"content":"3}"},"finish_reason":"stop"}]}`,
			`{"choices":[],"usage":{"completion_tokens":9}}`,
		} {
			fmt.Fprintf(w, ": a comment\n\ndata: %s\n\n", event)
			w.(http.Flusher).Flush()
			time.Sleep(5 * time.Millisecond)
		}
		fmt.Fprint(w, "data: [DONE]\n\n")
	}))
	defer server.Close()
	served, err := servedName(context.Background(), server.URL+"/v1")
	if err != nil || served != "tiny" {
		t.Fatalf("got %q, %v", served, err)
	}
	var shown strings.Builder
	a, err := ask(context.Background(), server.URL+"/v1", served, "What is 1 + 2?", func(p string) { shown.WriteString(p) })
	if err != nil {
		t.Fatal(err)
	}
	if a.reasoning.String() != "1 + 2" || a.content.String() != `\boxed{3}` || shown.String() != "1 + 2\n\\boxed{3}" {
		t.Errorf("got %q, %q, shown %q", a.reasoning.String(), a.content.String(), shown.String())
	}
	if a.tokens != 9 || a.finish != "stop" || a.first < 30*time.Millisecond || a.total < a.first+10*time.Millisecond || a.tokensPerSecond() > 9/0.04 {
		t.Errorf("measured %+v", a)
	}
	if request["stream"] != true || request["model"] != "tiny" {
		t.Errorf("asked %v", request)
	}
}

func TestABrokenStreamIsAnError(t *testing.T) {
	for text, want := range map[string]string{
		"data: {\"choices\":[{\"delta\":{\"content\":\"a\"}}]}\n": "without [DONE]",
		"data: [DONE]\n":   "without a token",
		"data: not json\n": "not JSON",
		"data: {\"error\":{\"message\":\"the queue is full\"}}\n":      "the queue is full",
		"data: {\"choices\":[]}\n" + strings.Repeat("x", 2<<20) + "\n": "the stream broke",
	} {
		if _, err := readStream(strings.NewReader(text), time.Now(), func(string) {}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.40q: got %v", text, err)
		}
	}
}

func TestAnHTTPErrorShowsItsBody(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w, `{"error":{"message":"no such model"}}`, http.StatusNotFound)
	}))
	defer server.Close()
	_, err := ask(context.Background(), server.URL, "x", "y", func(string) {})
	if err == nil || !strings.Contains(err.Error(), "404") || !strings.Contains(err.Error(), "no such model") {
		t.Errorf("got %v", err)
	}
}

func TestTheVerdictIsHonest(t *testing.T) {
	if v := verdict(`so \boxed{579}`, 123, 456); !strings.HasPrefix(v, "right") {
		t.Error(v)
	}
	if v := verdict(`so \boxed{5790}`, 123, 456); !strings.HasPrefix(v, "wrong: it is 579") {
		t.Error(v)
	}
}

func TestProgressOfALoadingModel(t *testing.T) {
	m := &model{}
	if err := json.Unmarshal([]byte(`{"metadata":{"generation":2},"status":{"observedGeneration":1,"phase":"Loading",
		"load":{"pod":"a","phase":"loading","bytesLoaded":5000000,"bytesTotal":10000000,"bytesPerSecond":2500000000,"etaSeconds":2,"percent":50},
		"conditions":[{"type":"Ready","status":"False","reason":"Loading","message":"1 of 2"}]}}`), m); err != nil {
		t.Fatal(err)
	}
	if got := m.progress(); got != "Loading: loading 50 %, 5.0 MB of 10.0 MB, 2.5 GB/s, 2 s left" {
		t.Error(got)
	}
	if m.current() || m.condition("Ready").Status != "False" || m.condition("Planned").Status != "Unknown" {
		t.Errorf("%+v", m)
	}
}

func TestOldGoIsTold(t *testing.T) {
	for version, want := range map[string]int{"go1.26.8": 26, "go1.19": 19, "go1.27rc1": -1} {
		minor, ok := goMinor(version)
		if want < 0 && ok || want >= 0 && (minor != want || !ok) {
			t.Errorf("%s: %d, %v", version, minor, ok)
		}
	}
	if _, ok := goMinor("devel go1.27-abc"); ok {
		t.Error("a development version has no number")
	}
}

func TestProgressCountsPackagesAndNotMessages(t *testing.T) {
	n, log := 0, &bytes.Buffer{}
	w := &lineCounter{to: log, counts: isPackage, progress: func(i int) { n = i }}
	for _, part := range []string{"go: downloading a v1\nk8s.io/a", "pi\nnet/http\n", "# k8s.io/api\n./x.go:1:2: undefined: y\n"} {
		if _, err := w.Write([]byte(part)); err != nil {
			t.Fatal(err)
		}
	}
	if n != 2 {
		t.Errorf("counted %d", n)
	}
	if !strings.Contains(log.String(), "undefined: y") {
		t.Error("the log is not complete")
	}
	if !isCrate("   Compiling serde v1.0.0") || isCrate("    Finished release") {
		t.Error("crates are not told from messages")
	}
}

func TestTheVersionIsReadFromTheModule(t *testing.T) {
	v, err := moduleVersion("../kubelab/go.mod", "k8s.io/kubernetes")
	if err != nil || !strings.HasPrefix(v, "v1.") {
		t.Fatalf("got %q, %v", v, err)
	}
	for _, want := range []string{"gitVersion=" + v, "gitMajor=1 ", "buildDate="} {
		if !strings.Contains(ldflags(v), want) {
			t.Errorf("%s lacks %s", ldflags(v), want)
		}
	}
	if _, err := moduleVersion("../kubelab/go.mod", "no/such"); err == nil {
		t.Error("a module that is not required has a version")
	}
}

func TestABuildDependsOnSourcesAndNotOnTests(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	hash := func() string {
		h, err := hashTree(dir, "go1.26")
		if err != nil {
			t.Fatal(err)
		}
		return h
	}
	write("a.go", "package a")
	first := hash()
	write("a_test.go", "package a")
	write("README.md", "words")
	if hash() != first {
		t.Error("a test or a text forces a build")
	}
	write("a.go", "package b")
	if hash() == first {
		t.Error("a changed source does not force a build")
	}
}

func TestModelFilesForTheImage(t *testing.T) {
	root := t.TempDir()
	folder := filepath.Join(root, "e2e/models/m")
	if err := os.MkdirAll(folder, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "train.py", "README.md"} {
		if err := os.WriteFile(filepath.Join(folder, f), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s := &session{options: options{root: root}}
	if _, err := s.imageFiles(image{models: []string{"m"}}); err == nil || !strings.Contains(err.Error(), "safetensors") {
		t.Errorf("a model without weights: %v", err)
	}
	if err := os.WriteFile(filepath.Join(folder, "model.safetensors"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	files, err := s.imageFiles(image{models: []string{"m"}})
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, f := range files {
		names = append(names, filepath.Base(f))
	}
	if want := []string{"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}; !slices.Equal(names, want) {
		t.Errorf("got %v", names)
	}
}

func TestChartValuesNameTheImages(t *testing.T) {
	s := &session{options: options{registry: "registry.example/team/", tag: "v1"}}
	values := strings.Join(s.imageValues(), " ")
	for _, want := range []string{"image.repository=registry.example/team/cachalot-operator", "engine.image.repository=registry.example/team/cachalot-engine", "engine.image.tag=v1", "image.pullPolicy=IfNotPresent"} {
		if !strings.Contains(values, want) {
			t.Errorf("%s lacks %s", values, want)
		}
	}
	s.images = []image{{name: "cachalot-engine", tag: "dev-abc"}}
	if values := strings.Join(s.imageValues(), " "); !strings.Contains(values, "engine.image.tag=dev-abc") || !strings.Contains(values, "engine.image.pullPolicy=Never") {
		t.Error(values)
	}
}

func TestAFailureSaysWhatWhyAndWhere(t *testing.T) {
	log := filepath.Join(t.TempDir(), "step.log")
	if err := os.WriteFile(log, []byte("first\nlast words\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	text := explain(step{name: "build", hint: "do that"}, errors.New("it broke"), log)
	for _, want := range []string{"Failed:  build", "Why:     it broke", log, "last words", "Way out: do that"} {
		if !strings.Contains(text, want) {
			t.Errorf("%s\nlacks %q", text, want)
		}
	}
}

func TestWaitingEndsWhenItCannotHelp(t *testing.T) {
	pods := func(reason string, restarts int) []byte {
		return fmt.Appendf(nil, `{"items":[{"metadata":{"name":"p"},"status":{"containerStatuses":[{"restartCount":%d,"state":{"waiting":{"reason":%q,"message":"m"}}}]}}]}`, restarts, reason)
	}
	for _, c := range []struct {
		reason   string
		restarts int
		give     bool
	}{{"ContainerCreating", 0, false}, {"CrashLoopBackOff", 1, false}, {"CrashLoopBackOff", 3, true}, {"ErrImageNeverPull", 0, true}, {"ImagePullBackOff", 0, false}} {
		if _, err := podTrouble(pods(c.reason, c.restarts)); (err != nil) != c.give {
			t.Errorf("%+v: %v", c, err)
		}
	}
	if text, err := podTrouble([]byte(`{"items":[]}`)); text != "" || err != nil {
		t.Errorf("no pods: %q, %v", text, err)
	}
}

func TestMissingPackagesAreNamedOnce(t *testing.T) {
	list := []debianPackage{{"no-such-program", "package-a"}, {"no-such-either", "package-a"}, {"sh", "dash"}, {"nor-this", "package-b"}}
	if got := missingPackages(list); !slices.Equal(got, []string{"package-a", "package-b"}) {
		t.Errorf("got %v", got)
	}
}

func TestDurationsAndNames(t *testing.T) {
	for d, want := range map[time.Duration]string{1200 * time.Millisecond: "1.2 s", 125 * time.Second: "2 min 05 s"} {
		if got := seconds(d); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
	if got := slug("build the operator, and the engine"); got != "build-the-operator-and-the-engine" {
		t.Error(got)
	}
}

func TestAProcessIsKnownByItsStart(t *testing.T) {
	first, ok := processStart(os.Getpid())
	second, _ := processStart(os.Getpid())
	if !ok || first == "" || first != second {
		t.Errorf("%q, %q, %v", first, second, ok)
	}
}
