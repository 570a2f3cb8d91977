package envoy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"time"
)

// Command says how to start a Process.
type Command struct {
	Name string   // names the process in errors; required
	Path string   // the program; required
	Args []string // without the program's name
	Dir  string   // working directory; empty: the caller's
	Log  io.Writer
	// Log gets standard output and standard error as they come; nil: they are dropped. It must not block for long: the
	// process would.
	Line func(line []byte)
	// Line is called for each line of output, without its end, one at a time; nil: none. The slice is valid during the
	// call only.
}

// Process is a child process that never outlives its parent: it is killed when Kill or Stop says so, and on Linux also
// when the parent dies, however that dies. It is safe for concurrent use.
type Process struct {
	name string
	cmd  *exec.Cmd
	done chan struct{} // closed when the process has been reaped; err is set before
	err  error
}

// Start starts a process in a process group of its own, so that a Ctrl-C at the terminal reaches the parent alone, which
// then ends its children in the right order.
func Start(c Command) (*Process, error) {
	p := &Process{name: c.Name, cmd: exec.Command(c.Path, c.Args...), done: make(chan struct{})}
	out := &output{log: c.Log, line: c.Line}
	p.cmd.Dir, p.cmd.Stdout, p.cmd.Stderr = c.Dir, out, out
	p.cmd.SysProcAttr = attributes()
	p.cmd.WaitDelay = 2 * time.Second // a grandchild that holds the pipe open is not waited for
	started := make(chan error, 1)
	go func() { // owned by p: ends with the process, which Kill and Stop wait for
		// The kernel ties the parent-death signal to the thread that forked, so that thread has to stay.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := p.cmd.Start()
		started <- err
		if err != nil {
			return
		}
		p.err = p.cmd.Wait()
		out.flush()
		close(p.done)
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s: %w", c.Name, err)
	}
	return p, nil
}

// Pid is the id of the process and of its group.
func (p *Process) Pid() int { return p.cmd.Process.Pid }

// Done is closed when the process has ended and all its output was delivered.
func (p *Process) Done() <-chan struct{} { return p.done }

// Err says how the process ended: nil for exit code 0. It may be called when Done is closed.
func (p *Process) Err() error {
	if p.err != nil {
		return fmt.Errorf("%s ended: %w", p.name, p.err)
	}
	return nil
}

// Kill ends the process and its group at once (SIGKILL) and waits until it is gone.
func (p *Process) Kill() {
	p.signal(kill)
	<-p.done
}

// Stop asks the process to end (SIGTERM), waits until it has, and kills it when ctx ends first.
func (p *Process) Stop(ctx context.Context) error {
	p.signal(terminate)
	select {
	case <-p.done:
		return nil
	case <-ctx.Done():
		p.Kill()
		return fmt.Errorf("%s did not end when asked: %w", p.name, context.Cause(ctx))
	}
}

func (p *Process) signal(how func(*os.Process) error) {
	select {
	case <-p.done: // its id may already be another's
	default:
		_ = how(p.cmd.Process) // fails when it has just ended, which is what was asked for
	}
}

// Run starts a process, waits for its end, and kills it when ctx ends first. The error of a process that failed ends with
// the last line that it wrote.
func Run(ctx context.Context, c Command) error {
	var last string
	line := c.Line
	c.Line = func(b []byte) {
		last = string(b)
		if line != nil {
			line(b)
		}
	}
	p, err := Start(c)
	if err != nil {
		return err
	}
	select {
	case <-p.Done():
		if err := p.Err(); err != nil {
			return fmt.Errorf("%w: %s", err, last)
		}
		return nil
	case <-ctx.Done():
		p.Kill()
		return fmt.Errorf("%s: %w", c.Name, context.Cause(ctx))
	}
}

// maxLine bounds what is kept of a line that does not end.
const maxLine = 64 << 10

// output splits what a process writes into lines. exec.Cmd writes to it from one goroutine at a time.
type output struct {
	log  io.Writer
	line func([]byte)
	rest []byte // of a line that has not ended yet
}

func (o *output) Write(b []byte) (int, error) {
	if o.log != nil {
		if _, err := o.log.Write(b); err != nil && !errors.Is(err, os.ErrClosed) {
			return 0, err
		}
	}
	if o.line == nil {
		return len(b), nil
	}
	o.rest = append(o.rest, b...)
	for {
		line, rest, ok := bytes.Cut(o.rest, []byte("\n"))
		if !ok {
			break
		}
		o.line(line)
		o.rest = rest
	}
	if len(o.rest) > maxLine {
		o.rest = o.rest[:0]
	}
	return len(b), nil
}

// flush delivers a last line that has no end.
func (o *output) flush() {
	if o.line != nil && len(o.rest) > 0 {
		o.line(o.rest)
	}
}
