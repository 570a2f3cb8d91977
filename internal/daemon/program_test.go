package daemon

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"github.com/signet-ca/signet/api"
)

// program is a daemon whose configuration is its path; "bad" cannot be loaded.
func program(ran *[]string) Program[string] {
	note := func(what string) { *ran = append(*ran, what) }
	var gently bool
	return Program[string]{
		Name: "signet-x", Short: "A daemon", Version: "v9", Config: "/etc/x.yaml",
		Load: func(path string) (string, error) {
			if path == "bad" {
				return "", api.E(api.ConfigInvalid, "bad: it is bad")
			}
			return path, nil
		},
		RunShort: "Serve",
		Run: func(_ context.Context, c string, log *slog.Logger) error {
			note("run " + c)
			log.Info("it ran")
			return nil
		},
		CheckShort: "Check",
		Check:      func(c string) (string, error) { note("check " + c); return "all of it", nil },
		Others: []Command[string]{{Name: "init", Short: "Begin", Do: func(_ context.Context, c string, out io.Writer) error {
			note("init " + c)
			if gently {
				return nil
			}
			return errors.New("not today")
		}, Flags: func(c *cobra.Command) { c.Flags().BoolVar(&gently, "gently", false, "fail not") }}, {Name: "book", Short: "Read", Others: []Command[string]{
			{Name: "read", Short: "Read it", Words: "[PAGE]", Look: func(_ context.Context, load func() (string, error), word string, out io.Writer) error {
				if word == "" {
					c, err := load()
					if err != nil {
						return err
					}
					word = c
				}
				note("read " + word)
				return nil
			}},
			{Name: "check", Short: "Check it", Look: func(context.Context, func() (string, error), string, io.Writer) error {
				return &Findings{"a page is missing"}
			}},
		}}},
	}
}

func TestProgram(t *testing.T) {
	for _, tt := range []struct {
		name, args string
		code       int
		ran        string
		out, err   string // parts of what it prints
	}{
		{"none", "", 0, "", "  signet-x init --config /etc/x.yaml\n  signet-x book read [PAGE]\n  signet-x book check\n  signet-x run --config /etc/x.yaml\n", ""},
		{"version", "--version", 0, "", "signet-x version v9\n", ""},
		{"run", "run", 0, "run /etc/x.yaml", "", `"msg":"it ran"`},
		{"run as text", "run --config y --log-format text", 0, "run y", "", `msg="it ran"`},
		{"run in silence", "run --log-level error", 0, "run /etc/x.yaml", "", ""},
		{"check", "check-config --config y", 0, "check y", "y is good: all of it\n", ""},
		{"other", "init --config y", ExitFailed, "init y", "", "signet-x: not today\n"},
		{"other, with a flag of its own", "init --gently --config y", 0, "init y", "", ""},
		{"a flag of another's", "run --gently", ExitUsage, "", "", "unknown flag: --gently; see signet-x run --help"},
		{"a word", "book read 7 --config bad", 0, "read 7", "", ""},
		{"no word", "book read --config y", 0, "read y", "", ""},
		{"no word, bad configuration", "book read --config bad", ExitFailed, "", "", "bad: it is bad"},
		{"two words", "book read 7 8", ExitUsage, "", "", `unexpected "8"; see signet-x book read --help`},
		{"findings", "book check", ExitFindings, "", "", "signet-x: a page is missing\n"},
		{"a command of commands", "book", 0, "", "signet-x book read [PAGE]", ""},
		{"unknown inner command", "book burn", ExitUsage, "", "", `unknown command "burn"; see signet-x book --help`},
		{"bad configuration", "run --config bad", ExitFailed, "", "", "signet explain SGN-"},
		{"bad configuration, checked", "check-config --config bad", ExitFailed, "", "", "bad: it is bad"},
		{"bad configuration, other", "init --config bad", ExitFailed, "", "", "bad: it is bad"},
		{"bad level", "run --log-level loud", ExitUsage, "", "", `"loud" is not debug`},
		{"bad format", "run --log-format xml", ExitUsage, "", "", `"xml" is not json`},
		{"unknown command", "start", ExitUsage, "", "", `unknown command "start"; see signet-x --help`},
		{"unexpected word", "run now", ExitUsage, "", "", `unexpected "now"; see signet-x run --help`},
		{"unknown flag", "run --quick", ExitUsage, "", "", "unknown flag: --quick; see signet-x run --help"},
		{"no completion", "completion", ExitUsage, "", "", `unknown command "completion"`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var ran []string
			var out, errs strings.Builder
			code := program(&ran).execute(strings.Fields(tt.args), &out, &errs)
			if got := strings.Join(ran, ", "); code != tt.code || got != tt.ran {
				t.Errorf("exit code %d after %q, want %d after %q; it said %s", code, got, tt.code, tt.ran, &errs)
			}
			if !strings.Contains(out.String(), tt.out) || (out.Len() > 0) != (tt.out != "") {
				t.Errorf("stdout is %q, want %q in it", &out, tt.out)
			}
			if !strings.Contains(errs.String(), tt.err) || (errs.Len() > 0) != (tt.err != "") {
				t.Errorf("stderr is %q, want %q in it", &errs, tt.err)
			}
		})
	}
}
