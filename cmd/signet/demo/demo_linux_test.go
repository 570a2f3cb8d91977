package demo

import (
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/signet-ca/signet/api"
)

// The programs of these tests are scripts that only say what the real ones would say.
const (
	goodCA = `case $1 in init) ;; run)
echo '{"msg":"serving","what":"grpc","address":"127.0.0.1:1"}'
exec sleep 600 ;; esac`
	goodAgent = `echo '{"msg":"serving","what":"sds","address":"agent.sock"}'; exec sleep 600`
)

// world is where a demo runs in a test: what it may write to is the test's own.
func world(t *testing.T, ca, agent string) Config {
	t.Helper()
	if _, err := exec.LookPath("/bin/sh"); err != nil {
		t.Skip("no /bin/sh")
	}
	dir := t.TempDir()
	base, err := os.MkdirTemp("", "d") // shorter than that of the test: sockets are made there
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(base) })
	t.Setenv("TMPDIR", t.TempDir()) // for logs
	for name, script := range map[string]string{"signet-ca": ca, "signet-agent": agent} {
		// Each writes its id down, so that the test can see that it is gone.
		text := "#!/bin/sh\necho $$ >>" + filepath.Join(dir, "pids") + "\n" + script + "\n"
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "pids"), nil, 0o600); err != nil { // a demo may end before it starts anybody
		t.Fatal(err)
	}
	t.Cleanup(func() { nothingLeft(t, dir, base) })
	return Config{BinDir: dir, NoEnvoy: true, bases: []string{base}}
}

// nothingLeft checks that the processes are gone, and the folder.
func nothingLeft(t *testing.T, dir, base string) {
	if left, err := os.ReadDir(base); err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	pids, err := os.ReadFile(filepath.Join(dir, "pids"))
	if err != nil {
		t.Error(err)
	}
	for pid := range strings.Lines(string(pids)) {
		if _, err := os.Stat(filepath.Join("/proc", strings.TrimSpace(pid))); err == nil {
			t.Errorf("process %s is still there", pid)
		}
	}
}

func TestRunTellsWhatBroke(t *testing.T) {
	tests := map[string]struct{ ca, agent, want string }{
		"init fails":             {`echo 'the bundle is already published' >&2; exit 1`, goodAgent, "signet-ca init ended: exit status 1: the bundle is already published"},
		"the CA ends":            {`[ $1 = init ] || { echo bye; exit 7; }`, goodAgent, "signet-ca ended by itself: bye"},
		"the agent is killed":    {goodCA, `kill -9 $$`, "signet-agent ended: signal: killed"},
		"the agent ends quietly": {goodCA, `exit 0`, "signet-agent ended by itself"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			var progress strings.Builder
			cfg := world(t, tt.ca, tt.agent)
			cfg.Stderr, cfg.JSON = &progress, true
			err := Run(t.Context(), cfg)
			if api.ReasonOf(err) != api.DemoFailed || !strings.Contains(strings.ReplaceAll(err.Error(), "\n", ": "), tt.want) {
				t.Errorf("error %v, want %s", err, tt.want)
			}
			logs, _ := filepath.Glob(filepath.Join(os.Getenv("TMPDIR"), folderPrefix+"logs-*", "signet-ca.log"))
			if len(logs) != 1 || !strings.Contains(err.Error(), filepath.Dir(logs[0])) {
				t.Errorf("logs %v, error %v", logs, err)
			}
			for line := range strings.Lines(progress.String()) {
				if !json.Valid([]byte(line)) {
					t.Errorf("not JSON: %s", line)
				}
			}
		})
	}
}

// Whenever it is interrupted, nothing is left, no logs either, and the reason is not a failure of the demo.
func TestRunInterrupted(t *testing.T) {
	for _, when := range []string{"stand-in", "signet-ca    serves", "signet-agent serves"} {
		t.Run(when, func(t *testing.T) {
			ctx, cancel := context.WithCancelCause(t.Context())
			cfg := world(t, goodCA, goodAgent)
			cfg.Stderr = writerFunc(func(b []byte) {
				if strings.Contains(string(b), when) {
					cancel(api.E(api.Canceled, "enough"))
				}
			})
			if err := Run(ctx, cfg); api.ReasonOf(err) != api.Canceled {
				t.Errorf("error %v", err)
			}
			if left, _ := os.ReadDir(os.Getenv("TMPDIR")); len(left) != 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
}

// Whatever is under way when the time is over: here nobody serves SDS, so it never gets further.
func TestRunTimesOut(t *testing.T) {
	ctx, cancel := context.WithTimeoutCause(t.Context(), 2*time.Second, api.E(api.DeadlineExceeded, "too late"))
	defer cancel()
	err := Run(ctx, world(t, goodCA, goodAgent))
	if api.ReasonOf(err) != api.DeadlineExceeded || !strings.Contains(err.Error(), "the logs are in "+os.Getenv("TMPDIR")) {
		t.Errorf("error %v", err)
	}
}

func TestRunWithoutPrograms(t *testing.T) {
	base := t.TempDir()
	err := Run(t.Context(), Config{BinDir: t.TempDir(), bases: []string{base}})
	if api.ReasonOf(err) != api.ProgramMissing {
		t.Errorf("error %v", err)
	}
	if left, _ := os.ReadDir(base); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

// An Envoy that was asked for and does not run is an error before anything is started; one that was not is said to be
// missing in one line.
func TestFindEnvoy(t *testing.T) {
	t.Chdir(t.TempDir()) // no .cache
	t.Setenv("PATH", "")
	broken := filepath.Join(t.TempDir(), "envoy")
	if err := os.WriteFile(broken, []byte("#!/bin/sh\necho hello\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	good := filepath.Join(t.TempDir(), "envoy")
	if err := os.WriteFile(good, []byte("#!/bin/sh\necho '"+good+"  version: 9e55809/1.40.0/Clean/RELEASE/BoringSSL'\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	tests := map[string]struct {
		cfg    Config
		env    string
		path   string // ""
		peers  string
		reason api.Reason // of the error; empty: none
		said   string
	}{
		"there is none":                {Config{}, "", "", "Go", "", "envoy not found"},
		"it is not wanted":             {Config{NoEnvoy: true}, good, "", "Go", "", ""},
		"named by the flag":            {Config{Envoy: good}, broken, good, "Envoy 1.40.0", "", ""},
		"named by the environment":     {Config{}, good, good, "Envoy 1.40.0", "", ""},
		"the flag's is missing":        {Config{Envoy: "/nonexistent/envoy"}, "", "", "Go", api.ProgramMissing, ""},
		"the environment's is not one": {Config{}, broken, "", "Go", api.ProgramMissing, ""},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Setenv(EnvoyEnv, tt.env)
			var said string
			d := &demo{cfg: tt.cfg, say: func(who, format string, _ ...any) { said += who + " " + format + "\n" }}
			path, err := d.findEnvoy(t.Context())
			if (err != nil) != (tt.reason != "") || err != nil && api.ReasonOf(err) != tt.reason {
				t.Errorf("error %v, want %q", err, tt.reason)
			}
			if path != tt.path || d.report.Peers != tt.peers || !strings.HasPrefix(said, tt.said) || strings.Count(said, "\n") > 1 {
				t.Errorf("path %q, peers %q, said %q", path, d.report.Peers, said)
			}
		})
	}
	t.Run("cached", func(t *testing.T) {
		t.Setenv(EnvoyEnv, "")
		if err := os.MkdirAll(filepath.Dir(cachedEnvoy), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(good, cachedEnvoy); err != nil {
			t.Fatal(err)
		}
		d := &demo{}
		if path, err := d.findEnvoy(t.Context()); err != nil || !strings.HasSuffix(path, cachedEnvoy) || d.report.Peers != "Envoy 1.40.0" {
			t.Errorf("path %q, peers %q, %v", path, d.report.Peers, err)
		}
	})
}

type writerFunc func([]byte)

func (f writerFunc) Write(b []byte) (int, error) {
	f(b)
	return len(b), nil
}

func TestCommandRefusesNonsense(t *testing.T) {
	tests := map[string][]string{
		"an argument":        {"now"},
		"a format":           {"-o", "xml"},
		"both and neither":   {"--no-envoy", "--envoy", "/bin/envoy"},
		"a timeout below 0":  {"--timeout", "-1s"},
		"a flag of no one's": {"--fast"},
	}
	for name, args := range tests {
		t.Run(name, func(t *testing.T) {
			c := Command()
			c.SetArgs(args)
			c.SilenceErrors, c.SilenceUsage = true, true
			err := c.ExecuteContext(t.Context())
			if err == nil || api.ReasonOf(err) != api.Internal {
				t.Errorf("error %v, want one that is of usage", err)
			}
		})
	}
}
