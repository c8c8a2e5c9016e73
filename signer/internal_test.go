package signer

import (
	"context"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"testing"
	"time"

	"inkan/internal/caller"
)

// TestConnectionsOfAUser: one user does not take all descriptors of the signer.
func TestConnectionsOfAUser(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	inner, err := caller.Listen(path, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer inner.Close()
	const most = 3
	l := &callerListener{Listener: inner, log: slog.New(slog.DiscardHandler), most: most}
	accepted := make(chan net.Conn)
	go func() {
		defer close(accepted)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			accepted <- c
		}
	}()
	dial := func() net.Conn {
		t.Helper()
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		return c
	}
	var open []net.Conn
	for range most {
		dial()
		open = append(open, <-accepted)
	}
	over := dial()
	if err := over.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := over.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("one too many: %v", err)
	}
	for range 2 { // once is what counts
		_ = open[0].Close()
	}
	dial()
	select {
	case c := <-accepted:
		_ = c.Close()
	case <-time.After(10 * time.Second):
		t.Error("a place that became free is not")
	}
	for _, c := range open[1:] {
		_ = c.Close()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.open) != 0 {
		t.Errorf("%v are counted", l.open)
	}
}

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
