package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strings"
	"syscall"
	"time"
)

// answer is what came back from one streamed question.
type answer struct {
	reasoning, content strings.Builder
	finish             string
	tokens             int
	first, total       time.Duration // from the question to the first and to the last piece
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// tokensPerSecond is over the whole answer, the prompt's time included. Without it a small model would be flattered: its
// tokens pile up in the socket while the first one is being read.
func (a *answer) tokensPerSecond() float64 {
	if a.total <= 0 {
		return 0
	}
	return float64(a.tokens) / a.total.Seconds()
}

// chunk is one event of /v1/chat/completions with "stream": true.
type chunk struct {
	Choices []struct {
		Delta struct {
			Content          string
			ReasoningContent string `json:"reasoning_content"`
		}
		FinishReason string `json:"finish_reason"`
	}
	Usage *struct {
		CompletionTokens int `json:"completion_tokens"`
	}
	Error *struct{ Message string }
}

func (s *session) askStep() step {
	return step{
		name: "ask it",
		hint: "kubectl get endpointslices,pods --output=wide   (with KUBECONFIG=" + s.kubeconfig + ")",
		run: func() (string, error) {
			var err error
			if s.baseURL, err = s.reach(); err != nil {
				return "", err
			}
			defer s.stopForward()
			served, err := servedName(s.ctx, s.baseURL)
			if err != nil {
				return "", err
			}
			a, b := 100+rand.IntN(900), 100+rand.IntN(900)
			question := fmt.Sprintf("What is %d + %d?", a, b)
			s.ui.end("at " + s.baseURL)
			s.ui.println("\n  you    " + question)
			fmt.Fprint(s.ui.out, "  model  ")
			got, err := ask(s.ctx, s.baseURL, served, question, func(piece string) {
				fmt.Fprint(s.ui.out, strings.ReplaceAll(piece, "\n", "\n         "))
			})
			s.ui.println("")
			if err != nil {
				return "", err
			}
			s.ui.println(fmt.Sprintf("\n  %s; %d tokens in %.0f ms (%.0f tokens/s), first token after %.0f ms\n",
				verdict(got.content.String(), a, b), got.tokens, milliseconds(got.total), got.tokensPerSecond(), milliseconds(got.first)))
			return "", nil
		},
	}
}

// verdict checks the model's arithmetic; it is small, and may be wrong.
func verdict(content string, a, b int) string {
	if strings.Contains(content, fmt.Sprintf(`\boxed{%d}`, a+b)) {
		return fmt.Sprintf("right: it is %d", a+b)
	}
	return fmt.Sprintf("wrong: it is %d (a model this small errs now and then)", a+b)
}

// reach finds an address of the model's Service that this machine can talk to: the Service's own where
// there is a node, else a port forwarded by kubectl.
func (s *session) reach() (string, error) {
	address, err := s.output(s.kubectl("get", "service", quickstartModel, "--output=jsonpath={.spec.clusterIP}"))
	if err != nil {
		return "", err
	}
	if isFile(s.labFile("node/kubelet.yaml")) && s.kubeconfig == s.labFile("admin.kubeconfig") {
		return "http://" + address + "/v1", nil
	}
	s.ui.say("forwarding a port")
	c := s.kubectl("port-forward", "--address=127.0.0.1", "service/"+quickstartModel, ":80")
	out, err := c.StdoutPipe()
	if err != nil {
		return "", err
	}
	c.Stderr = s.log
	if err := c.Start(); err != nil {
		return "", err
	}
	s.forward = c
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		return "", fmt.Errorf("kubectl port-forward ended early: %w", err)
	}
	go func() { _, _ = io.Copy(io.Discard, out) }()
	_, rest, ok := strings.Cut(line, "Forwarding from ")
	if !ok {
		return "", fmt.Errorf("kubectl port-forward said: %s", strings.TrimSpace(line))
	}
	local, _, _ := strings.Cut(rest, " ")
	return "http://" + local + "/v1", nil
}

func (s *session) stopForward() {
	if s.forward != nil {
		_ = syscall.Kill(-s.forward.Process.Pid, syscall.SIGTERM)
		_ = s.forward.Wait()
		s.forward = nil
	}
}

// servedName asks what the model is called. The Service's address may take a moment to work.
func servedName(ctx context.Context, baseURL string) (string, error) {
	client := &http.Client{Timeout: 5 * time.Second}
	var last error
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(200 * time.Millisecond) {
		if ctx.Err() != nil {
			return "", ctx.Err()
		}
		var list struct{ Data []struct{ ID string } }
		if last = getJSON(ctx, client, baseURL+"/models", &list); last == nil {
			if len(list.Data) == 0 {
				return "", errors.New(baseURL + "/models lists no model")
			}
			return list.Data[0].ID, nil
		}
	}
	return "", fmt.Errorf("the Service does not answer: %w", last)
}

func getJSON(ctx context.Context, client *http.Client, url string, to any) error {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	response, err := client.Do(r)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", url, response.Status)
	}
	return json.NewDecoder(response.Body).Decode(to)
}

// ask streams one question; each piece of the answer is shown as it comes.
func ask(ctx context.Context, baseURL, model, question string, show func(string)) (*answer, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	body, err := json.Marshal(map[string]any{
		"model": model, "stream": true, "stream_options": map[string]bool{"include_usage": true}, "temperature": 0,
		"messages": []map[string]string{{"role": "user", "content": question}},
	})
	if err != nil {
		return nil, err
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, baseURL+"/chat/completions", bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	r.Header.Set("Content-Type", "application/json")
	start := time.Now()
	response, err := http.DefaultClient.Do(r)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		b, _ := io.ReadAll(io.LimitReader(response.Body, 2000))
		return nil, fmt.Errorf("%s: %s", response.Status, strings.TrimSpace(string(b)))
	}
	return readStream(response.Body, start, show)
}

// readStream reads server-sent events until [DONE].
func readStream(body io.Reader, start time.Time, show func(string)) (*answer, error) {
	a := &answer{}
	var first, last time.Time
	lines := bufio.NewScanner(body)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		data, ok := strings.CutPrefix(lines.Text(), "data:")
		if !ok {
			continue // comments and empty lines
		}
		data = strings.TrimSpace(data)
		if data == "[DONE]" {
			if first.IsZero() {
				return nil, errors.New("the stream ended without a token")
			}
			a.first, a.total = first.Sub(start), last.Sub(start)
			return a, nil
		}
		var c chunk
		if err := json.Unmarshal([]byte(data), &c); err != nil {
			return nil, fmt.Errorf("an event that is not JSON: %w: %s", err, firstLine(data, 200))
		}
		if c.Error != nil {
			return nil, fmt.Errorf("the model answered with an error: %s", c.Error.Message)
		}
		if c.Usage != nil {
			a.tokens = c.Usage.CompletionTokens
		}
		for _, choice := range c.Choices {
			piece := choice.Delta.ReasoningContent + choice.Delta.Content
			if piece != "" {
				last = time.Now()
				if first.IsZero() {
					first = last
				}
				if choice.Delta.Content != "" && a.content.Len() == 0 && a.reasoning.Len() > 0 {
					show("\n")
				}
				show(piece)
			}
			a.reasoning.WriteString(choice.Delta.ReasoningContent)
			a.content.WriteString(choice.Delta.Content)
			if choice.FinishReason != "" {
				a.finish = choice.FinishReason
			}
		}
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("the stream broke: %w", err)
	}
	return nil, errors.New("the stream ended without [DONE]")
}
