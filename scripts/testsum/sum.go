package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"regexp"
	"slices"
	"strings"

	"github.com/signet-ca/signet/internal/canary"
)

// event is one line of `go test -json` (go doc test2json).
type event struct {
	Action     string
	Package    string
	ImportPath string // of a build; its output has no Package
	Test       string
	Output     string
}

// sum counts tests and tells of packages as they finish.
type sum struct {
	out                     io.Writer
	passed, failed, skipped int

	output  map[[2]string][]string // package and test, to what it has printed; dropped with its verdict
	running map[string]bool        // packages without a verdict
	broken  map[string]bool        // packages in which a test failed
	skips   map[string][]string    // reason to tests

	secrets canary.Search
	tails   map[[2]string]string // package and test, to the end of what it has printed, which a secret may begin in
	shown   map[string]bool      // where a secret was seen
}

func newSum(out io.Writer) *sum {
	s := &sum{out: out, output: make(map[[2]string][]string), running: make(map[string]bool), broken: make(map[string]bool), skips: make(map[string][]string),
		tails: make(map[[2]string]string), shown: make(map[string]bool)}
	s.secrets.Add("the canary", []byte(canary.Marker))
	s.secrets.AddKeys()
	return s
}

// search looks for the marker of secrets in what was printed, also where it is cut into pieces.
func (s *sum) search(pkg, test, text string) {
	key := [2]string{pkg, test}
	text = s.tails[key] + text
	if len(s.secrets.Find([]byte(text))) > 0 {
		s.shown[strings.TrimSpace(pkg+" "+test)] = true
	}
	s.tails[key] = text[max(0, len(text)-s.secrets.Longest()+1):]
}

// read counts the events of one `go test`.
func (s *sum) read(r io.Reader) error {
	in := bufio.NewReader(r)
	for {
		line, err := in.ReadString('\n')
		if len(line) > 0 {
			var e event
			if json.Unmarshal([]byte(line), &e) != nil || e.Action == "" {
				s.search("go test", "", line)
				fmt.Fprint(s.out, line) // not an event: go speaks for itself
			} else {
				s.event(e)
			}
		}
		if errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return err
		}
	}
	for pkg := range s.running {
		s.failed++
		fmt.Fprintf(s.out, "FAIL\t%s ended without a verdict\n", pkg)
	}
	clear(s.running)
	return nil
}

func (s *sum) event(e event) {
	key := [2]string{e.Package, e.Test}
	if e.Output != "" {
		s.search(e.Package, e.Test, e.Output)
	}
	switch e.Action {
	case "start":
		s.running[e.Package] = true
	case "build-output":
		fmt.Fprint(s.out, e.Output)
	case "output":
		if e.Test == "" && verdict.MatchString(e.Output) {
			fmt.Fprint(s.out, e.Output)
			return
		}
		s.output[key] = append(s.output[key], e.Output)
	case "pass", "fail", "skip":
		if e.Test == "" {
			s.packageDone(e)
		} else {
			s.testDone(e)
		}
		delete(s.output, key)
		delete(s.tails, key)
	}
}

// verdict is the line with which a package ends.
var verdict = regexp.MustCompile(`^(ok  |FAIL|---|\?   )\t|^FAIL$`)

// marks are the lines with which go test frames what a test prints.
var marks = regexp.MustCompile(`^\s*(=== |--- )`)

func (s *sum) testDone(e event) {
	printed := s.output[[2]string{e.Package, e.Test}]
	switch e.Action {
	case "pass":
		s.passed++
	case "skip":
		s.skipped++
		reason := "no reason given"
		for _, line := range printed {
			if !marks.MatchString(line) {
				reason = strings.TrimSpace(line)
			}
		}
		// "file_test.go:12: reason": the place differs, the reason is what many tests share.
		if _, after, ok := strings.Cut(reason, ".go:"); ok {
			_, reason, _ = strings.Cut(after, ": ")
		}
		s.skips[reason] = append(s.skips[reason], e.Test+" ("+e.Package+")")
	case "fail":
		s.failed++
		s.broken[e.Package] = true
		fmt.Fprint(s.out, strings.Join(printed, ""))
	}
}

func (s *sum) packageDone(e event) {
	delete(s.running, e.Package)
	if e.Action != "fail" {
		return
	}
	fmt.Fprint(s.out, strings.Join(s.output[[2]string{e.Package, ""}], ""))
	hung := false
	for _, key := range slices.SortedFunc(maps.Keys(s.output), func(a, b [2]string) int { return strings.Compare(a[1], b[1]) }) {
		if key[0] == e.Package && key[1] != "" {
			hung = true
			fmt.Fprint(s.out, strings.Join(s.output[key], ""))
			delete(s.output, key)
		}
	}
	if hung || !s.broken[e.Package] {
		s.failed++ // it did not build, or TestMain, a panic or a time limit ended it
	}
}

// close tells what was skipped, where a secret was shown, and the sum.
func (s *sum) close() {
	for _, reason := range slices.Sorted(maps.Keys(s.skips)) {
		fmt.Fprintf(s.out, "skipped: %s: %s\n", reason, strings.Join(s.skips[reason], ", "))
	}
	for _, where := range slices.Sorted(maps.Keys(s.shown)) {
		s.failed++
		fmt.Fprintf(s.out, "FAIL\t%s printed a secret: the marker that every token and key of the tests carries\n", where)
	}
	fmt.Fprintf(s.out, "%d passed, %d failed, %d skipped\n", s.passed, s.failed, s.skipped)
}
