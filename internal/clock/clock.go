// Package clock watches this host's clock: how far it is from UTC, as whoever
// keeps it estimates, and whether somebody has set it. [New] a [Watch], [Watch.Run] it.
//
// That a clock was set shows beside CLOCK_BOOTTIME, which nobody can set.
package clock

import (
	"context"
	"fmt"
	"os/exec"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"inkan/scope"
)

// Where the state of the clock comes from.
const (
	Auto   = "auto"   // chrony where it answers, otherwise the kernel
	Chrony = "chrony" // chronyd, asked by chronyc
	Kernel = "kernel" // adjtimex
	None   = "none"   // nothing is known
)

const (
	every = time.Second      // between two looks at the clock
	ask   = 10 * time.Second // between two questions to chronyd
	stale = 30 * time.Second // a state that is older is none

	// tolerance is by how much the clock may have been set before it counts: a
	// leap second is less, and to pull the clock slowly pulls the boot clock along.
	tolerance = time.Second + 100*time.Millisecond

	// within is how far from UTC a source may have the clock that agrees with it.
	within = time.Second
)

// Watch watches the clock. It is safe for concurrent use.
type Watch struct {
	source string
	read   func() (wall time.Time, boot time.Duration, err error)
	query  func(ctx context.Context) (*scope.Clock, error)
	synced func() bool // by the kernel's account

	mu       sync.Mutex
	baseline time.Duration // wall clock less boot clock, as it should be
	state    *scope.Clock
	why      error         // there is no state
	at       time.Duration // of the state, of the boot clock
	jump     *Jump
}

// Jump says that the clock was set.
type Jump struct {
	By time.Duration // ahead; negative: back
}

func (j *Jump) String() string {
	way, by := "forward", j.By
	if by < 0 {
		way, by = "back", -by
	}
	return fmt.Sprintf("the clock was set %s by %s", way, by.Round(time.Millisecond))
}

// New begins to watch. host is where chronyd listens, if not where chronyc
// looks for it: an address, or the path of its socket. expected is what wall clock less boot clock was when it
// was last in order, in this boot; zero: not known.
func New(source, host string, expected time.Duration) (*Watch, error) {
	w := &Watch{source: source, read: readClocks, synced: func() bool { _, err := kernel(); return err == nil }}
	switch source {
	case Auto:
		w.query = func(ctx context.Context) (*scope.Clock, error) {
			if c, err := chrony(ctx, host); err == nil {
				return c, nil
			}
			return kernel()
		}
	case Chrony:
		w.query = func(ctx context.Context) (*scope.Clock, error) { return chrony(ctx, host) }
	case Kernel:
		w.query = func(context.Context) (*scope.Clock, error) { return kernel() }
	case None:
		w.query = func(context.Context) (*scope.Clock, error) {
			return nil, fmt.Errorf("no source of the clock's state is configured")
		}
	default:
		return nil, fmt.Errorf("clock source %.16q: auto, chrony, kernel or none is expected", source)
	}
	return w, w.begin(expected)
}

func (w *Watch) begin(expected time.Duration) error {
	wall, boot, err := w.read()
	if err != nil {
		return err
	}
	w.baseline = difference(wall, boot)
	if expected != 0 {
		w.baseline = expected
		w.look(wall, boot)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	w.sample(ctx)
	return nil
}

// difference is the wall clock less the boot clock: both in the range of a Duration.
func difference(wall time.Time, boot time.Duration) time.Duration {
	return time.Duration(wall.UnixNano()) - boot
}

func readClocks() (time.Time, time.Duration, error) {
	var t unix.Timespec
	err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &t)
	return time.Now(), time.Duration(t.Nano()), err
}

// look compares the clocks; the caller has the mutex, or nobody else the watch.
func (w *Watch) look(wall time.Time, boot time.Duration) {
	off := difference(wall, boot) - w.baseline
	if off > tolerance || off < -tolerance {
		w.jump = &Jump{off}
	} else {
		w.jump = nil // or it was set to where it was
	}
}

// Time is the time. After the clock was set it is what the clock would show if it had not been.
func (w *Watch) Time() time.Time {
	wall, boot, err := w.read()
	w.mu.Lock()
	defer w.mu.Unlock()
	if err != nil {
		return wall
	}
	if w.look(wall, boot); w.jump != nil {
		return time.Unix(0, int64(boot+w.baseline))
	}
	return wall
}

// Now says whether the clock was set, and what is known of it. A nil state says why.
func (w *Watch) Now() (state *scope.Clock, jump *Jump, why error) {
	wall, boot, err := w.read()
	w.mu.Lock()
	defer w.mu.Unlock()
	if err != nil {
		return nil, w.jump, err
	}
	w.look(wall, boot)
	if w.state != nil && boot-w.at > stale {
		return nil, w.jump, fmt.Errorf("the last answer about the clock is %s old", (boot - w.at).Round(time.Second))
	}
	return w.state, w.jump, w.why
}

// Expected is what New takes after a restart in this boot.
func (w *Watch) Expected() time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.baseline
}

// Accept takes the clock for right as it is now: somebody who may say so has.
func (w *Watch) Accept() error {
	wall, boot, err := w.read()
	if err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.accept(wall, boot)
	return nil
}

func (w *Watch) accept(wall time.Time, boot time.Duration) {
	w.baseline, w.jump = difference(wall, boot), nil
}

// Run looks at the clock until ctx ends.
func (w *Watch) Run(ctx context.Context) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	asked := time.Now()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		_, jump, _ := w.Now()
		if w.source == Kernel || jump != nil || time.Since(asked) >= ask {
			w.sample(ctx)
			asked = time.Now()
		}
	}
}

// sample asks the source. After the clock was set, a source that has it right
// again, and a kernel that is synchronised since, agree with it.
func (w *Watch) sample(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	w.mu.Lock()
	before := w.jump
	w.mu.Unlock()
	state, why := w.query(ctx)
	wall, boot, err := w.read()
	agrees := err == nil && state != nil && time.Duration(state.Divergence)*time.Microsecond <= within && w.synced()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.state, w.why, w.at = state, why, boot
	if agrees && (w.jump == nil || before != nil) {
		w.accept(wall, boot)
	}
}

// kernel asks the kernel, whose bound grows while nobody disciplines the clock,
// and which takes a clock that was set for unsynchronised.
func kernel() (*scope.Clock, error) {
	var t unix.Timex
	state, err := unix.Adjtimex(&t)
	if err != nil {
		return nil, fmt.Errorf("the kernel's clock: %w", err)
	}
	if state == unix.TIME_ERROR || t.Status&unix.STA_UNSYNC != 0 || t.Maxerror < 0 {
		return nil, fmt.Errorf("the kernel says that the clock is not synchronised: run chrony or a PTP client")
	}
	return &scope.Clock{Source: scope.ClockKernel, Divergence: uint64(t.Maxerror)}, nil
}

// chrony asks the chronyd at an address or socket, or chronyc's own choice. Its error is at most |offset| + root dispersion + half the root delay.
func chrony(ctx context.Context, host string) (*scope.Clock, error) {
	path, err := exec.LookPath("chronyc")
	if err != nil {
		return nil, fmt.Errorf("chrony: %w: apt-get install chrony", err)
	}
	args := []string{"-n", "-c", "tracking"}
	if host != "" {
		args = append([]string{"-h", host}, args...)
	}
	out, err := exec.CommandContext(ctx, path, args...).Output()
	if err != nil {
		return nil, fmt.Errorf("chronyc tracking: %w", err)
	}
	return parseTracking(string(out))
}

// Fields of chronyc -c tracking.
const (
	fieldOffset     = 4
	fieldDelay      = 10
	fieldDispersion = 11
	fieldLeap       = 13
	fields          = 14
)

// parseTracking reads what chronyc -c tracking prints.
func parseTracking(text string) (*scope.Clock, error) {
	f := strings.Split(strings.TrimSpace(text), ",")
	if len(f) != fields {
		return nil, fmt.Errorf("chronyc tracking: %d fields, %d are expected", len(f), fields)
	}
	if leap := f[fieldLeap]; leap != "Normal" && leap != "Insert second" && leap != "Delete second" {
		return nil, fmt.Errorf("chrony says: %.40q", leap)
	}
	var seconds [3]float64
	for i, n := range [...]int{fieldOffset, fieldDelay, fieldDispersion} {
		d, err := time.ParseDuration(f[n] + "s")
		if err != nil || d < -24*time.Hour || d > 24*time.Hour {
			return nil, fmt.Errorf("chronyc tracking: field %d: %.40q", n+1, f[n])
		}
		seconds[i] = max(d.Seconds(), -d.Seconds())
	}
	micros := (seconds[0] + seconds[1]/2 + seconds[2]) * 1e6
	if micros >= 86400e6 { // a statement says at most a day, and this is rounded up
		return nil, fmt.Errorf("chrony says that the clock is more than a day off")
	}
	return &scope.Clock{Source: scope.ClockChrony, Divergence: uint64(micros) + 1}, nil
}
