package dashboards

import (
	"context"
	"encoding/json"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/prometheus/prometheus/util/teststorage"
)

// scrapes in the order in which they were made, half a minute apart.
var scrapes = []string{"idle", "busy", "busier"}

const interval = 30 * time.Second

func read(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("testdata", name+".prom"))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// What vLLM's names force: a colon, a histogram that ends in _total, a unit that is cut short.
func isForced(problem promlint.Problem) bool {
	if !strings.HasPrefix(problem.Metric, "vllm:") {
		return false
	}
	return strings.Contains(problem.Text, "should not contain ':'") ||
		problem.Metric == "vllm:iteration_tokens_total" && strings.Contains(problem.Text, "_total")
}

func TestTheExpositionPassesTheRulesOfPromtool(t *testing.T) {
	for _, name := range scrapes {
		problems, err := promlint.New(strings.NewReader(read(t, name))).Lint()
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		forced := 0
		for _, problem := range problems {
			if isForced(problem) {
				forced++
				continue
			}
			t.Errorf("%s: %s: %s", name, problem.Metric, problem.Text)
		}
		if forced < 20 {
			t.Errorf("%s: only %d of vLLM's names were seen; is this the exposition of a ready engine?", name, forced)
		}
	}
}

// The rules do find what is wrong: the same check over metrics with known faults.
func TestTheRulesFindFaults(t *testing.T) {
	for text, fault := range map[string]string{
		"# HELP a_milliseconds x\n# TYPE a_milliseconds gauge\na_milliseconds 1\n": "base unit",
		"# TYPE b_total counter\nb_total 1\n":                                      "no help text",
		"# HELP c x\n# TYPE c counter\nc 1\n":                                      "_total",
	} {
		problems, err := promlint.New(strings.NewReader(text)).Lint()
		if err != nil || len(problems) != 1 || isForced(problems[0]) || !strings.Contains(problems[0].Text, fault) {
			t.Errorf("%q: %v, %v", text, problems, err)
		}
	}
}

// lab is a Prometheus that scraped the recordings.
type lab struct {
	storage *teststorage.TestStorage
	engine  *promql.Engine
	types   map[string]dto.MetricType
	end     time.Time
}

func scrape(t *testing.T) *lab {
	t.Helper()
	storage := teststorage.New(t)
	t.Cleanup(func() { _ = storage.Close() })
	// Prometheus' clock, not the recording's: the start of the process lies before the first scrape.
	begin := time.Now().Truncate(time.Second)
	types := map[string]dto.MetricType{}
	appender := storage.Appender(context.Background())
	for number, name := range scrapes {
		at := begin.Add(time.Duration(number) * interval)
		add := func(name string, pairs []*dto.LabelPair, extra string, value float64) {
			builder := labels.NewBuilder(labels.FromStrings("__name__", name, "job", "engine", "instance", "10.0.0.7:8000"))
			for _, pair := range pairs {
				builder.Set(pair.GetName(), pair.GetValue())
			}
			if extra != "" {
				builder.Set("le", extra)
			}
			if _, err := appender.Append(0, builder.Labels(), at.UnixMilli(), value); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
		}
		add("up", nil, "", 1)
		text := expfmt.NewTextParser(model.UTF8Validation)
		families, err := text.TextToMetricFamilies(strings.NewReader(read(t, name)))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		for name, family := range families {
			types[name] = family.GetType()
			for _, metric := range family.GetMetric() {
				pairs := metric.GetLabel()
				switch {
				case metric.GetHistogram() != nil:
					histogram := metric.GetHistogram()
					for _, bucket := range histogram.GetBucket() {
						bound := strconv.FormatFloat(bucket.GetUpperBound(), 'g', -1, 64)
						add(name+"_bucket", pairs, strings.Replace(bound, "+Inf", "+Inf", 1), float64(bucket.GetCumulativeCount()))
					}
					add(name+"_sum", pairs, "", histogram.GetSampleSum())
					add(name+"_count", pairs, "", float64(histogram.GetSampleCount()))
				case metric.GetCounter() != nil:
					add(name, pairs, "", metric.GetCounter().GetValue())
				default:
					add(name, pairs, "", metric.GetGauge().GetValue())
				}
			}
		}
	}
	if err := appender.Commit(); err != nil {
		t.Fatal(err)
	}
	engine := promql.NewEngine(promql.EngineOpts{MaxSamples: 1_000_000, Timeout: time.Minute})
	t.Cleanup(func() { _ = engine.Close() })
	return &lab{storage, engine, types, begin.Add(time.Duration(len(scrapes)-1) * interval)}
}

func (l *lab) ask(t *testing.T, expr string) (promql.Vector, error) {
	t.Helper()
	asked, err := l.engine.NewInstantQuery(context.Background(), l.storage, nil, expr, l.end)
	if err != nil {
		return nil, err
	}
	defer asked.Close()
	result := asked.Exec(context.Background())
	if result.Err != nil {
		return nil, result.Err
	}
	// The samples belong to the query, which is about to be closed.
	vector, err := result.Vector()
	return append(promql.Vector(nil), vector...), err
}

// family is the metric that a series is part of, and its type.
func (l *lab) family(series string) (string, dto.MetricType, bool) {
	for _, suffix := range []string{"", "_bucket", "_sum", "_count"} {
		name := strings.TrimSuffix(series, suffix)
		kind, found := l.types[name]
		isPart := suffix != ""
		if found && strings.HasSuffix(series, suffix) && isPart == (kind == dto.MetricType_HISTOGRAM) {
			return name, kind, true
		}
	}
	return "", 0, series == "up"
}

// problems of a query: series that are not there or of the wrong type, and an answer without a number.
func (l *lab) problems(t *testing.T, expr string) []string {
	t.Helper()
	tree, err := parser.NewParser(parser.Options{}).ParseExpr(expr)
	if err != nil {
		return []string{err.Error()}
	}
	var found []string
	parser.Inspect(tree, func(node parser.Node, path []parser.Node) error {
		selector, is := node.(*parser.VectorSelector)
		if !is {
			return nil
		}
		if _, exempt := notOfAnEngine[selector.Name]; exempt {
			return nil
		}
		_, kind, known := l.family(selector.Name)
		if !known {
			found = append(found, selector.Name+" is not exposed")
			return nil
		}
		plain := parser.VectorSelector{Name: selector.Name, LabelMatchers: selector.LabelMatchers}
		if series, err := l.ask(t, plain.String()); err != nil || len(series) == 0 {
			found = append(found, plain.String()+" selects nothing")
		}
		for _, above := range path {
			call, is := above.(*parser.Call)
			if !is {
				continue
			}
			counts := kind == dto.MetricType_COUNTER || kind == dto.MetricType_HISTOGRAM
			switch call.Func.Name {
			case "rate", "increase", "irate":
				if !counts {
					found = append(found, selector.Name+" is no counter, but its rate is asked for")
				}
			case "max_over_time", "avg_over_time", "delta":
				if counts {
					found = append(found, selector.Name+" is no gauge, but is averaged")
				}
			}
		}
		return nil
	})
	vector, err := l.ask(t, expr)
	if err != nil {
		return append(found, err.Error())
	}
	if len(found) == 0 && !asksOnlyOthers(tree) && !hasNumber(vector) {
		found = append(found, "no number: "+vector.String())
	}
	return found
}

func asksOnlyOthers(tree parser.Expr) bool {
	only := true
	parser.Inspect(tree, func(node parser.Node, _ []parser.Node) error {
		if selector, is := node.(*parser.VectorSelector); is && notOfAnEngine[selector.Name] == "" {
			only = false
		}
		return nil
	})
	return only
}

func hasNumber(vector promql.Vector) bool {
	for _, sample := range vector {
		if !math.IsNaN(sample.F) && !math.IsInf(sample.F, 0) {
			return true
		}
	}
	return false
}

func TestEveryQueryFindsItsSeries(t *testing.T) {
	lab := scrape(t)
	asked := append([]query(nil), queries...)
	// Published dashboards that somebody downloaded: DASHBOARDS=DIR go test ./e2e/dashboards
	if folder := os.Getenv("DASHBOARDS"); folder != "" {
		downloaded := published(t, folder)
		if len(downloaded) == 0 {
			t.Fatalf("no query in %s", folder)
		}
		t.Logf("%d queries in %s", len(downloaded), folder)
		asked = append(asked, downloaded...)
	}
	for _, query := range asked {
		for _, problem := range lab.problems(t, query.expr) {
			t.Errorf("%s: %s\n  %s", query.who, query.expr, problem)
		}
	}
}

// Every series that the engine claims under vLLM's names is asked for by somebody here, so that none is claimed in vain.
func TestEverySeriesOfVllmIsAskedFor(t *testing.T) {
	lab := scrape(t)
	asked := map[string]bool{}
	for _, query := range queries {
		tree, err := parser.NewParser(parser.Options{}).ParseExpr(query.expr)
		if err != nil {
			t.Fatal(err)
		}
		parser.Inspect(tree, func(node parser.Node, _ []parser.Node) error {
			if selector, is := node.(*parser.VectorSelector); is {
				name, _, _ := lab.family(selector.Name)
				asked[name] = true
			}
			return nil
		})
	}
	for name := range lab.types {
		if strings.HasPrefix(name, "vllm:") && !asked[name] {
			t.Errorf("%s is exposed, but no query asks for it", name)
		}
	}
}

// The check does find what is missing: queries that must fail, each for its own reason.
func TestTheCheckFindsFaults(t *testing.T) {
	lab := scrape(t)
	for expr, fault := range map[string]string{
		`sum(rate(vllm:no_such_thing_total[1m])) or vector(0)`:    "is not exposed",
		`vllm:num_requests_running{model_name="another"}`:         "selects nothing",
		`rate(vllm:num_requests_running[1m])`:                     "no counter",
		`max_over_time(vllm:prompt_tokens_total[1m])`:             "no gauge",
		`vllm:kv_cache_usage_perc > 2`:                            "no number",
		`vllm:request_success_total{reason="stop"}`:               "selects nothing",
		`sum by (le) (rate(vllm:prompt_tokens_total_bucket[1m]))`: "is not exposed",
		`histogram_quantile(0.5, vllm:num_requests_running`:       "unclosed",
	} {
		problems := strings.Join(lab.problems(t, expr), "; ")
		if !strings.Contains(problems, fault) {
			t.Errorf("%s: %q does not say %q", expr, problems, fault)
		}
	}
}

var (
	anyOf  = regexp.MustCompile(`=~\s*"\$\{?\w+(:\w+)?\}?"`)
	oneOf  = regexp.MustCompile(`model_name\s*=\s*"\$\{?\w+\}?"`)
	window = regexp.MustCompile(`\[\s*(\$__\w+|\$\{__\w+\})\s*\]`)
)

// published are the queries of Grafana dashboards in a folder, their variables set to the recorded engine.
func published(t *testing.T, folder string) []query {
	t.Helper()
	var found []query
	err := filepath.WalkDir(folder, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() || filepath.Ext(path) != ".json" {
			return err
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		var content any
		if err := json.Unmarshal(text, &content); err != nil {
			return err
		}
		var walk func(any)
		walk = func(value any) {
			switch value := value.(type) {
			case map[string]any:
				if expr, is := value["expr"].(string); is {
					expr = anyOf.ReplaceAllString(expr, `=~".+"`)
					expr = oneOf.ReplaceAllString(expr, `model_name="toy"`)
					expr = window.ReplaceAllString(expr, `[1m]`)
					found = append(found, query{filepath.Base(path), expr})
				}
				for _, below := range value {
					walk(below)
				}
			case []any:
				for _, below := range value {
					walk(below)
				}
			}
		}
		walk(content)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}
