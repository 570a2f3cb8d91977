package run

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

var errBroken = errors.New("broken")

// after returns what a task does: it waits for d, or for the end of its context, whose error it then returns.
func after(d time.Duration, err error) func(context.Context) error {
	return func(ctx context.Context) error {
		select {
		case <-time.After(d):
			return err
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func TestAll(t *testing.T) {
	for _, tc := range []struct {
		name   string
		cancel time.Duration // of the caller's context; 0: never
		tasks  []Task
		want   string // the error's beginning; empty: none
		took   time.Duration
	}{
		{"none", 0, nil, "", 0},
		{"all end by themselves", 0, []Task{{"a", after(1*time.Second, nil)}, {"b", after(2*time.Second, nil)}}, "", 2 * time.Second},
		{"one that ends leaves the others alone", time.Hour, []Task{{"a", after(1*time.Second, nil)}, {"b", after(24*time.Hour, nil)}}, "", time.Hour},
		{"the first error ends the others", 0, []Task{{"a", after(time.Second, errBroken)}, {"b", after(time.Hour, nil)}}, "a: broken", time.Second},
		{"of two errors the first", 0, []Task{
			{"late", func(ctx context.Context) error { <-ctx.Done(); time.Sleep(time.Minute); return errors.New("late") }},
			{"early", after(time.Second, errBroken)},
		}, "early: broken", time.Second + time.Minute},
		{"the caller ends", time.Minute, []Task{{"a", after(time.Hour, errBroken)}}, "", time.Minute},
		{"slow to end is waited for", time.Minute, []Task{
			{"a", func(ctx context.Context) error { <-ctx.Done(); time.Sleep(5 * time.Second); return nil }},
		}, "", time.Minute + 5*time.Second},
		{"a cancellation of its own is an error", 0, []Task{
			{"a", func(context.Context) error { return context.Canceled }},
			{"b", after(time.Hour, nil)},
		}, "a: context canceled", 0},
		{"panic", 0, []Task{{"a", func(context.Context) error { panic("oh") }}, {"b", after(time.Hour, nil)}}, "a: panic: oh\ngoroutine ", 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				if tc.cancel > 0 {
					time.AfterFunc(tc.cancel, cancel)
				}
				start := time.Now()
				err := All(ctx, tc.tasks...)
				if took := time.Since(start); took != tc.took {
					t.Errorf("took %v, want %v", took, tc.took)
				}
				if tc.want == "" && err != nil || !strings.HasPrefix(fmt.Sprint(err), tc.want) {
					t.Errorf("error %v, want %q", err, tc.want)
				}
			})
		})
	}
}

func TestAllWraps(t *testing.T) {
	err := All(t.Context(), Task{"a", func(context.Context) error { return fmt.Errorf("deep: %w", errBroken) }})
	if !errors.Is(err, errBroken) || err.Error() != "a: deep: broken" {
		t.Errorf("error %v", err)
	}
	// One All inside another keeps both names.
	err = All(t.Context(), Task{"outer", func(ctx context.Context) error {
		return All(ctx, Task{"inner", func(context.Context) error { return errBroken }})
	}})
	if !errors.Is(err, errBroken) || err.Error() != "outer: inner: broken" {
		t.Errorf("error %v", err)
	}
}
