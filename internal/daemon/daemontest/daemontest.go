// Package daemontest holds the commands that the scripts of both daemons are written in (testscript): to change a
// configuration, to ask the port of health and metrics, to end what runs and see how it ended.
package daemontest

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// patience is how long something may take to become true on a busy machine.
const patience = 30 * time.Second

// Command is a command of scripts, as testscript.Params.Cmds holds them.
type Command = func(ts *testscript.TestScript, neg bool, args []string)

// Commands returns the commands of both daemons' scripts, and own beside them:
//
//	[!] http ADDRESS/PATH [PATTERN ...]  waits for an answer of 200 (with !, of anything else) whose body every pattern matches
//	edit FILE OLD NEW                    replaces OLD, which must be there once; \n in NEW begins a line
//	mode FILE MODE                       the file has exactly that mode
//	exit CODE COMMAND [ARG ...]          the command ends with that code
//	says FILE PATTERN ...                waits until every pattern matches what is in the file
//	term                                 sends SIGTERM to all that runs in the background
func Commands(own map[string]Command) map[string]Command {
	all := map[string]Command{"http": get, "edit": edit, "mode": mode, "exit": Exit, "says": says, "term": term}
	maps.Copy(all, own)
	return all
}

// FreeAddress returns an address on loopback whose TCP port is free. It is none of those that the kernel gives to
// connections: what else runs here would take one of those before long. Nor does another test draw it while this process
// lives, since the UDP port of the same number is held for as long: what a script draws, it often binds seconds later.
func FreeAddress() (string, error) {
	var last error
	for range 100 {
		address := fmt.Sprintf("127.0.0.1:%d", 10000+rand.IntN(22000))
		mark, err := net.ListenPacket("udp", address)
		if err != nil {
			last = err
			continue
		}
		l, err := net.Listen("tcp", address)
		if err != nil {
			last = errors.Join(err, mark.Close())
			continue
		}
		marks.Lock()
		marks.held = append(marks.held, mark)
		marks.Unlock()
		return address, l.Close()
	}
	return "", last
}

// marks are the UDP ports of the addresses that were drawn. They are kept here for nothing but to stay open.
var marks struct {
	sync.Mutex
	held []net.PacketConn
}

func get(ts *testscript.TestScript, neg bool, args []string) {
	need(ts, len(args) > 0, "http ADDRESS/PATH [PATTERN ...]")
	var last string
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		ok, body := ask(args[0])
		if last = body; ok != neg && matches(ts, body, args[1:]) {
			return
		}
	}
	ts.Fatalf("%s answered last:\n%s", args[0], last)
}

func says(ts *testscript.TestScript, neg bool, args []string) {
	need(ts, !neg && len(args) > 1, "says FILE PATTERN ...")
	var last []byte
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		data, err := os.ReadFile(ts.MkAbs(args[0]))
		if last = data; err == nil && matches(ts, string(data), args[1:]) {
			return
		}
	}
	ts.Fatalf("%s said:\n%s", args[0], last)
}

func ask(target string) (ok bool, body string) {
	resp, err := http.Get("http://" + target)
	if err != nil {
		return false, err.Error()
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return false, err.Error()
	}
	return resp.StatusCode == http.StatusOK, string(data)
}

func matches(ts *testscript.TestScript, body string, patterns []string) bool {
	for _, p := range patterns {
		re, err := regexp.Compile("(?m)" + p)
		ts.Check(err)
		if !re.MatchString(body) {
			return false
		}
	}
	return true
}

func edit(ts *testscript.TestScript, neg bool, args []string) {
	need(ts, !neg && len(args) == 3, "edit FILE OLD NEW")
	path := ts.MkAbs(args[0])
	data, err := os.ReadFile(path)
	ts.Check(err)
	if strings.Count(string(data), args[1]) != 1 {
		ts.Fatalf("%s does not have %q once", args[0], args[1])
	}
	ts.Check(os.WriteFile(path, []byte(strings.Replace(string(data), args[1], strings.ReplaceAll(args[2], `\n`, "\n"), 1)), 0o600))
}

func mode(ts *testscript.TestScript, neg bool, args []string) {
	need(ts, !neg && len(args) == 2, "mode FILE MODE")
	info, err := os.Lstat(ts.MkAbs(args[0]))
	ts.Check(err)
	want, err := strconv.ParseUint(args[1], 8, 32)
	ts.Check(err)
	if info.Mode().Perm() != fs.FileMode(want) {
		ts.Fatalf("%s has mode %o, want %o", args[0], info.Mode().Perm(), want)
	}
}

// Exit is the command `exit`, for scripts that need no other.
func Exit(ts *testscript.TestScript, neg bool, args []string) {
	need(ts, !neg && len(args) > 1, "exit CODE COMMAND [ARG ...]")
	err := ts.Exec(args[1], args[2:]...)
	code := 0
	if e, ok := errors.AsType[interface {
		error
		ExitCode() int
	}](err); ok {
		code = e.ExitCode()
	} else {
		ts.Check(err)
	}
	if strconv.Itoa(code) != args[0] {
		ts.Fatalf("%s ended with %d, want %s", strings.Join(args[1:], " "), code, args[0])
	}
}

func term(ts *testscript.TestScript, neg bool, args []string) {
	need(ts, !neg && len(args) == 0, "term")
	for _, c := range ts.BackgroundCmds() {
		ts.Check(c.Process.Signal(syscall.SIGTERM))
	}
}

// need fails the script unless a command was called as it is used.
func need(ts *testscript.TestScript, ok bool, usage string) {
	if !ok {
		ts.Fatalf("usage: %s", usage)
	}
}
