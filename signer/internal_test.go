package signer

import (
	"context"
	"testing"
	"time"
)

// TestPause: a renewal is due when its time has come by the clock, though timers
// stood still meanwhile.
func TestPause(t *testing.T) {
	begun := time.Now()
	for what, clock := range map[string]struct {
		now  func() time.Time
		wait time.Duration
	}{
		"suspended":     {func() time.Time { return begun.Round(0).Add(time.Since(begun) / time.Millisecond * time.Hour) }, 10 * time.Hour},
		"not suspended": {time.Now, 20 * time.Millisecond},
		"at once":       {func() time.Time { return begun }, 0},
	} {
		ctx, end := context.WithTimeout(t.Context(), 10*time.Second)
		if !pause(ctx, clock.wait, 5*time.Millisecond, clock.now) {
			t.Errorf("%s: it did not end", what)
		}
		end()
	}
	ctx, end := context.WithCancel(t.Context())
	end()
	if pause(ctx, time.Hour, time.Minute, time.Now) {
		t.Error("it was ended before its time, and said it was not")
	}
}
