//go:build linux

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
)

// A child is this program once more, pinned: it reads one JSON object for each thing to do and answers with one.
type request struct {
	Do  string          `json:"do"`
	Arg json.RawMessage `json:"arg"`
}

type answer struct {
	Error  string          `json:"error,omitempty"`
	Result json.RawMessage `json:"result,omitempty"`
}

// role is what a child can be asked to do.
type role interface {
	do(ctx context.Context, what string, arg json.RawMessage) (any, error)
}

var errUnknown = errors.New("nobody knows how to do that")

func serveChild(ctx context.Context, name string, in io.Reader, out io.Writer) error {
	var r role
	switch name {
	case "ceiling":
		r = new(ceiling)
	case "ledger":
		r = new(ledger)
	case "cluster":
		r = new(cluster)
	case "floor":
		r = new(floor)
	case "callers":
		r = new(callers)
	case "ca":
		r = new(authority)
	case "issuer":
		r = new(issuer)
	case "attestor":
		r = new(tokens)
	case "apiserver":
		r = new(apiserver)
	case "reviewer":
		r = new(reviewer)
	case "decider":
		r = new(decider)
	default:
		return fmt.Errorf("there is no role %q", name)
	}
	// A child ends with the standard input that its parent holds.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if c, ok := r.(io.Closer); ok {
		defer c.Close()
	}
	dec, enc := json.NewDecoder(bufio.NewReader(in)), json.NewEncoder(out)
	for {
		var q request
		if err := dec.Decode(&q); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		var a answer
		result, err := r.do(ctx, q.Do, q.Arg)
		if err == nil {
			a.Result, err = json.Marshal(result)
		}
		if err != nil {
			a.Error = err.Error()
		}
		if err := enc.Encode(a); err != nil {
			return err
		}
	}
}

// process is one of our programs, or a child.
type process struct {
	cmd  *exec.Cmd
	done chan struct{}
	in   io.WriteCloser // of a child
	enc  *json.Encoder
	dec  *json.Decoder
}

func (p *process) pid() int { return p.cmd.Process.Pid }

// start starts a program on these processors. What it says on standard error goes to dir/name.log.
func (b *bench) start(dir, name string, on cpus, child bool, args ...string) (*process, error) {
	log, err := os.OpenFile(filepath.Join(dir, name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	p := &process{done: make(chan struct{})}
	p.cmd = exec.Command(b.self, append([]string{"pin", on.String()}, args...)...)
	p.cmd.Stderr, p.cmd.Env = log, append(os.Environ(), "NODE_NAME="+nodeName(0), "TMPDIR="+dir)
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if child {
		var out io.ReadCloser
		if p.in, err = p.cmd.StdinPipe(); err == nil {
			out, err = p.cmd.StdoutPipe()
		}
		if err != nil {
			return nil, err
		}
		p.enc, p.dec = json.NewEncoder(p.in), json.NewDecoder(bufio.NewReader(out))
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.abandoned {
		return nil, errors.New("interrupted")
	}
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	b.children = append(b.children, p)
	go func() {
		defer close(p.done)
		if !child { // Wait would close what a child's last answer is read from
			_ = p.cmd.Wait()
		}
	}()
	return p, nil
}

func (b *bench) child(dir, role string, on cpus) (*process, error) {
	return b.start(dir, role, on, true, b.self, "child", role)
}

// ask has a child do something and returns what it says.
func ask[T any](p *process, what string, arg any) (result T, err error) {
	raw, err := json.Marshal(arg)
	if err == nil {
		err = p.enc.Encode(request{what, raw})
	}
	var a answer
	if err == nil {
		err = p.dec.Decode(&a)
	}
	switch {
	case err != nil:
		return result, fmt.Errorf("%s: %w", what, err)
	case a.Error != "":
		return result, fmt.Errorf("%s: %s", what, a.Error)
	}
	return result, json.Unmarshal(a.Result, &result)
}

// end ends a process, and waits.
func (p *process) end() {
	if p == nil {
		return
	}
	if p.in != nil {
		_ = p.in.Close()
		kill := time.AfterFunc(20*time.Second, func() { _ = p.cmd.Process.Kill() })
		defer kill.Stop()
		_ = p.cmd.Wait()
		return
	}
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(20 * time.Second):
		_ = p.cmd.Process.Kill()
		<-p.done
	}
}
