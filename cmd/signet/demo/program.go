package demo

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/signet-ca/signet/internal/envoy"
)

// startTimeout is how long a program may take until it serves.
const startTimeout = 15 * time.Second

// program is signet-ca or signet-agent: it can be killed and started again.
type program struct {
	name, path string
	args       []string
	log        *os.File
	died       func(error) // called when it ends although nobody killed it

	mu      sync.Mutex
	process *envoy.Process    // nil while it is not running
	serving map[string]string // addresses by what is served there, of this run
	changed chan struct{}     // closed when serving changes
	last    string            // line of its log
	watch   sync.WaitGroup
}

// start starts the program; it serves a little later, see await.
func (p *program) start() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.serving, p.changed = map[string]string{}, make(chan struct{})
	process, err := envoy.Start(envoy.Command{Name: p.name, Path: p.path, Args: p.args, Log: p.log, Line: p.line})
	if err != nil {
		return err
	}
	p.process = process
	p.watch.Go(func() {
		<-process.Done()
		p.mu.Lock()
		unasked := p.process == process
		last := p.last
		p.mu.Unlock()
		if unasked {
			p.died(fmt.Errorf("%w: %s", errors.Join(process.Err(), errors.New(p.name+" ended by itself")), last))
		}
	})
	return nil
}

// kill is SIGKILL: the program gets no chance to say goodbye.
func (p *program) kill() {
	p.mu.Lock()
	process := p.process
	p.process = nil
	p.mu.Unlock()
	if process != nil {
		process.Kill()
	}
	p.watch.Wait()
}

// stop asks the program to end, as an operator would, and kills it when it does not.
func (p *program) stop(ctx context.Context) error {
	p.mu.Lock()
	process := p.process
	p.process = nil
	p.mu.Unlock()
	if process == nil {
		return nil
	}
	defer p.watch.Wait()
	return process.Stop(ctx)
}

// line reads one line of the program's log.
func (p *program) line(b []byte) {
	var l struct {
		Msg, What, Address string
	}
	bad := json.Unmarshal(b, &l) != nil // a panic, or the runtime's own words
	p.mu.Lock()
	defer p.mu.Unlock()
	p.last = string(b)
	if !bad && l.Msg == "serving" {
		p.serving[l.What] = l.Address
		close(p.changed)
		p.changed = make(chan struct{})
	}
}

// await returns the address at which the program serves what, once it does.
func (p *program) await(ctx context.Context, what string) (string, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, startTimeout, fmt.Errorf("%s does not serve %s after %s", p.name, what, startTimeout))
	defer cancel()
	for {
		p.mu.Lock()
		address, changed := p.serving[what], p.changed
		p.mu.Unlock()
		if address != "" {
			return address, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return "", context.Cause(ctx)
		}
	}
}

// pid is the id of the running process, and 0 when there is none.
func (p *program) pid() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.process == nil {
		return 0
	}
	return p.process.Pid()
}
