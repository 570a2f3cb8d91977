//go:build linux

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// goals are the keys that the file always has, in the order of their table; where one was not measured, it says why.
var goals = []string{
	"issue_grpc_of_ceiling", "server_cpu_over_crypto", "sds_warm_p99_ms", "sds_cold_p99_ms", "fanout_10k_ms",
	"agent_rss_100_mb", "bytes_per_stream", "ledger_of_svid", "idle_5000_cores", "drill_1000_seconds", "replace_1000_seconds",
}

const notAsked = "not asked for"

// about is what the figures were taken on. It names no host, no user and no folder.
type about struct {
	Date       string `json:"date"` // UTC
	Processors int    `json:"processors"`
	Server     int    `json:"server_processors"` // of them, those on which the server alone runs
	Model      string `json:"model"`
	Memory     int    `json:"memory_gib"`
	Kernel     string `json:"kernel"`
	Go         string `json:"go"`
	Rounds     int    `json:"rounds"`
	Minutes    int    `json:"minutes"` // that the run took
	Short      bool   `json:"short,omitempty"`
}

// aboutKey is the one member of the file that is no figure.
const aboutKey = "run"

func newAbout(b *bench) about {
	a := about{
		Date: time.Now().UTC().Format(time.DateOnly), Processors: len(b.server) + len(b.client), Server: len(b.server), Model: modelName(),
		Go: runtime.Version(), Rounds: b.options.rounds, Short: b.short, Minutes: int(time.Since(b.began).Round(time.Minute).Minutes()),
	}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		a.Kernel = "Linux " + unix.ByteSliceToString(u.Release[:]) + " " + runtime.GOARCH
	}
	var s unix.Sysinfo_t
	if unix.Sysinfo(&s) == nil {
		a.Memory = int((uint64(s.Totalram)*uint64(s.Unit) + 1<<29) >> 30)
	}
	return a
}

// document is the file: one JSON object, its members the figures by key, in their order, after what they were taken on.
type document struct {
	about about
	*figures
}

// encode writes a document as JSON. Of the goals it has those as well that were not asked for.
func (d document) encode() ([]byte, error) {
	var out bytes.Buffer
	member := func(end, key string, v any) error {
		text, err := json.MarshalIndent(v, "  ", "  ")
		fmt.Fprintf(&out, "%s\n  %q: %s", end, key, text)
		return err
	}
	err := member("{", aboutKey, d.about)
	for _, x := range d.list {
		err = errors.Join(err, member(",", x.Key, x))
	}
	for _, key := range goals {
		if d.by[key] == nil {
			err = errors.Join(err, member(",", key, figure{Refused: notAsked}))
		}
	}
	out.WriteString("\n}\n")
	return out.Bytes(), err
}

// decodeDocument reads what encode wrote.
func decodeDocument(text []byte) (document, error) {
	d := document{figures: newFigures()}
	dec := json.NewDecoder(bytes.NewReader(text))
	if t, err := dec.Token(); err != nil || t != json.Delim('{') {
		return d, errors.Join(errors.New("the figures are no JSON object"), err)
	}
	for dec.More() {
		t, err := dec.Token()
		if err != nil {
			return d, err
		}
		key, _ := t.(string)
		if key == aboutKey {
			err = dec.Decode(&d.about)
		} else {
			x := &figure{Key: key}
			err = dec.Decode(x)
			d.list, d.by[key] = append(d.list, x), x
		}
		if err != nil {
			return d, fmt.Errorf("%s: %w", key, err)
		}
	}
	_, err := dec.Token()
	return d, err
}

// write writes the figures to a file.
func (d document) write(path string) error {
	text, err := d.encode()
	if err != nil {
		return err
	}
	return os.WriteFile(path, text, 0o644)
}

func modelName() string {
	text, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(text)) {
		if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == "model name" {
			return strings.TrimSpace(v)
		}
	}
	return "an unknown processor"
}
