package envoy

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"
)

// Program is signet-ca or signet-agent beside the Envoys: it can be killed and started again. It is safe for concurrent use.
type Program struct {
	Name, Path string
	Args       []string
	Log        io.Writer   // see Command.Log
	Died       func(error) // called when it ends although nobody killed it; required

	mu      sync.Mutex
	process *Process          // nil while it is not running
	serving map[string]string // addresses by what is served there, of this run
	changed chan struct{}     // closed when serving changes
	last    string            // line of its log
	watch   sync.WaitGroup
}

// Start starts the program; it serves a little later, see Await.
func (p *Program) Start() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.serving, p.changed = map[string]string{}, make(chan struct{})
	process, err := Start(Command{Name: p.Name, Path: p.Path, Args: p.Args, Log: p.Log, Line: p.line})
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
			p.Died(fmt.Errorf("%w: %s", errors.Join(process.Err(), errors.New(p.Name+" ended by itself")), last))
		}
	})
	return nil
}

// Kill is SIGKILL: the program gets no chance to say goodbye.
func (p *Program) Kill() {
	p.mu.Lock()
	process := p.process
	p.process = nil
	p.mu.Unlock()
	if process != nil {
		process.Kill()
	}
	p.watch.Wait()
}

// Stop asks the program to end, as an operator would, and kills it when it does not.
func (p *Program) Stop(ctx context.Context) error {
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
func (p *Program) line(b []byte) {
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

// Await returns the address at which the program serves what, once it says so in its log.
func (p *Program) Await(ctx context.Context, what string) (string, error) {
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
			return "", fmt.Errorf("%s does not serve %s: %w", p.Name, what, context.Cause(ctx))
		}
	}
}

// Pid is the id of the running process, and 0 when there is none.
func (p *Program) Pid() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.process == nil {
		return 0
	}
	return p.process.Pid()
}
