// Package run owns goroutines: a process, or a part of one, is a list of tasks that start and end together.
//
// Nothing in Signet starts a goroutine that nobody waits for. All returns only when every task has returned, so what a
// task uses (a file, a socket, a key) can be released by whoever called All.
package run

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"sync"
)

// A Task is one long-lived activity. Run returns nil when its work is done or its context has ended, and an error when
// the process cannot go on without it.
type Task struct {
	Name string                      // names the task in errors
	Run  func(context.Context) error // required
}

// All runs every task in a goroutine of its own and waits for all of them. The first error (or panic, which becomes an
// error with its stack) cancels the context of the others; All returns that first error, wrapped with the task's name.
// A task that returns nil ends alone. The end of ctx is not an error: tasks return and All returns nil.
func All(ctx context.Context, tasks ...Task) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	for _, t := range tasks {
		wg.Go(func() {
			err := protect(ctx, t.Run)
			if err == nil || errors.Is(err, context.Canceled) && ctx.Err() != nil {
				return
			}
			cancel(&taskError{fmt.Errorf("%s: %w", t.Name, err)})
		})
	}
	wg.Wait()
	if te, ok := errors.AsType[*taskError](context.Cause(ctx)); ok {
		return te.error
	}
	return nil
}

// taskError tells a task's own failure apart from the end of the caller's context.
type taskError struct{ error }

func (e *taskError) Unwrap() error { return e.error }

func protect(ctx context.Context, f func(context.Context) error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	return f(ctx)
}
