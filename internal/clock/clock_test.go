package clock

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"inkan/scope"
)

// hands are clocks that a test sets: to set the machine's would disturb others.
type hands struct {
	wall   time.Time
	boot   time.Duration
	state  *scope.Clock
	synced bool
}

func watch(h *hands, expected time.Duration) *Watch {
	w := &Watch{source: Auto, read: func() (time.Time, time.Duration, error) { return h.wall, h.boot, nil }, synced: func() bool { return h.synced },
		query: func(context.Context) (*scope.Clock, error) {
			if h.state == nil {
				return nil, errors.New("not synchronised")
			}
			return h.state, nil
		}}
	if err := w.begin(expected); err != nil {
		panic(err)
	}
	return w
}

func (h *hands) pass(d time.Duration) { h.wall, h.boot = h.wall.Add(d), h.boot+d }

func TestJump(t *testing.T) {
	day := time.Date(2026, 7, 27, 10, 0, 0, 0, time.UTC)
	good := &scope.Clock{Source: scope.ClockChrony, Divergence: 50}
	for _, by := range []time.Duration{24 * time.Hour, -24 * time.Hour, 2 * time.Second, -2 * time.Second} {
		h := &hands{wall: day, boot: time.Hour, state: good, synced: true}
		w := watch(h, 0)
		h.pass(time.Minute)
		h.wall = h.wall.Add(time.Second) // a leap second
		if _, jump, _ := w.Now(); jump != nil {
			t.Fatalf("a leap second: %v", jump)
		}
		w.sample(t.Context()) // the source agrees
		should := h.wall
		h.wall = h.wall.Add(by)
		h.synced = false // the kernel says so after the clock was set
		if _, jump, _ := w.Now(); jump == nil || jump.By != by {
			t.Fatalf("set by %s: %v", by, jump)
		}
		if got := w.Time(); !got.Equal(should) {
			t.Errorf("set by %s: the time is %s, should be %s", by, got, should)
		}
		h.pass(time.Hour)
		w.sample(t.Context())
		if _, jump, _ := w.Now(); jump == nil {
			t.Errorf("set by %s: forgotten after an hour without a source that agrees", by)
		}
		if got := w.Time(); !got.Equal(should.Add(time.Hour)) {
			t.Errorf("set by %s: an hour later the time is %s", by, got)
		}
		h.synced, h.state = true, &scope.Clock{Source: scope.ClockChrony, Divergence: 1_000_001}
		w.sample(t.Context())
		if _, jump, _ := w.Now(); jump == nil {
			t.Errorf("set by %s: a source that has it more than a second from UTC agrees", by)
		}
		h.state = &scope.Clock{Source: scope.ClockChrony, Divergence: 1_000_000}
		w.sample(t.Context())
		if _, jump, _ := w.Now(); jump != nil {
			t.Errorf("set by %s: the source agrees: %v", by, jump)
		}
		if !w.Time().Equal(h.wall) {
			t.Error("the source agrees, and the time is another")
		}
	}
}

// TestJumpUndone: a clock that is set to where it was is right again, and an
// operator may say that it is as it is.
func TestJumpUndone(t *testing.T) {
	h := &hands{wall: time.Unix(1e9, 0), boot: time.Hour}
	w := watch(h, 0)
	h.wall = h.wall.Add(time.Hour)
	if _, jump, _ := w.Now(); jump == nil {
		t.Fatal("not found")
	}
	h.wall = h.wall.Add(-time.Hour)
	if _, jump, _ := w.Now(); jump != nil {
		t.Fatal(jump)
	}
	h.wall = h.wall.Add(time.Hour)
	if err := w.Accept(); err != nil {
		t.Fatal(err)
	}
	if _, jump, _ := w.Now(); jump != nil {
		t.Fatal(jump)
	}
}

// TestCreep: many small steps are one large one.
func TestCreep(t *testing.T) {
	h := &hands{wall: time.Unix(1e9, 0), boot: time.Hour}
	w := watch(h, 0)
	for range 3 {
		h.pass(time.Minute)
		h.wall = h.wall.Add(900 * time.Millisecond)
		w.sample(t.Context())
	}
	if _, jump, _ := w.Now(); jump == nil {
		t.Error("three steps of 0.9 s were not found")
	}
}

// TestRestart: set while nobody watched, in the same boot.
func TestRestart(t *testing.T) {
	h := &hands{wall: time.Unix(1e9, 0), boot: time.Hour}
	expected := watch(h, 0).Expected()
	h.pass(time.Hour)
	if _, jump, _ := watch(h, expected).Now(); jump != nil {
		t.Fatal(jump)
	}
	h.wall = h.wall.Add(24 * time.Hour)
	w := watch(h, expected)
	if _, jump, _ := w.Now(); jump == nil || jump.String() != "the clock was set forward by 24h0m0s" {
		t.Fatal(jump)
	}
}

func TestStale(t *testing.T) {
	h := &hands{wall: time.Unix(1e9, 0), boot: time.Hour, state: &scope.Clock{Source: scope.ClockKernel, Divergence: 5}}
	w := watch(h, 0)
	if state, _, why := w.Now(); why != nil || state.Divergence != 5 {
		t.Fatal(state, why)
	}
	h.pass(time.Minute)
	if state, _, why := w.Now(); why == nil || state != nil {
		t.Error("an old answer is believed")
	}
}

// TestChrony asks a real chronyd, which keeps its hands off the clock.
func TestChrony(t *testing.T) {
	for _, name := range []string{"chronyd", "chronyc"} {
		if _, err := exec.LookPath(name); err != nil {
			t.Fatalf("%s is missing: apt-get install chrony", name)
		}
	}
	dir, err := os.MkdirTemp("", "chrony") // short, for the socket
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o770); err != nil {
		t.Fatal(err)
	}
	start := func(config string) (socket string) {
		socket = filepath.Join(dir, "sock")
		path := filepath.Join(dir, "conf")
		if err := os.WriteFile(path, []byte(config+"\nbindcmdaddress "+socket+"\npidfile "+dir+"/pid\ncmdport 0\nport 0\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("chronyd", "-x", "-d", "-u", "root", "-f", path)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
			_ = os.Remove(filepath.Join(dir, "pid"))
		})
		for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
			if exec.Command("chronyc", "-h", socket, "-n", "-c", "tracking").Run() == nil {
				return socket
			}
		}
		t.Fatal("chronyd does not answer")
		return ""
	}
	t.Run("synchronised", func(t *testing.T) {
		w, err := New(Chrony, start("local stratum 10"), 0)
		if err != nil {
			t.Fatal(err)
		}
		state, jump, why := w.Now()
		if why != nil || jump != nil || state == nil || state.Source != scope.ClockChrony || state.Divergence > 1000 {
			t.Errorf("%+v, %v, %v", state, jump, why)
		}
	})
	t.Run("nobody there", func(t *testing.T) {
		w, err := New(Chrony, filepath.Join(dir, "nothing"), 0)
		if err != nil {
			t.Fatal(err)
		}
		if state, _, why := w.Now(); state != nil || why == nil {
			t.Errorf("%+v, %v", state, why)
		}
	})
}

func TestTracking(t *testing.T) {
	line := "C0000201,192.0.2.1,3,1795800602.576169542,-0.000012500,0.000001000,0.000003000,-1.234,0.001,0.050,0.000400000,0.000100000,64.2,Normal"
	c, err := parseTracking(line + "\n")
	if err != nil || c.Divergence != 313 { // 12.5 + 200 + 100 microseconds, rounded up
		t.Errorf("%+v, %v", c, err)
	}
	for _, bad := range []string{"", "506 Cannot talk to daemon", strings.Replace(line, "Normal", "Not synchronised", 1), strings.Replace(line, "0.000400000", "NaN", 1),
		strings.Replace(line, "0.000400000", "1e300", 1), strings.Replace(line, "-0.000012500", "", 1), line + ",more",
		strings.NewReplacer("-0.000012500", "86400", "0.000400000", "0", "0.000100000", "0").Replace(line)} {
		if c, err := parseTracking(bad); err == nil {
			t.Errorf("%q: %+v", bad, c)
		}
	}
}

func FuzzTracking(f *testing.F) {
	f.Add("C0000201,192.0.2.1,3,1795800602.5,-0.0000125,0.000001,0.000003,-1.234,0.001,0.050,0.0004,0.0001,64.2,Normal")
	f.Fuzz(func(t *testing.T, text string) {
		if c, err := parseTracking(text); err == nil && c.Divergence > 86400*1e6 {
			t.Errorf("%q: %+v", text, c)
		}
	})
}

func TestNoSource(t *testing.T) {
	if _, err := New("sundial", "", 0); err == nil {
		t.Error("a source that is none")
	}
	w, err := New(None, "", 0)
	if err != nil {
		t.Fatal(err)
	}
	if state, jump, why := w.Now(); state != nil || jump != nil || why == nil {
		t.Errorf("%+v, %v, %v", state, jump, why)
	}
}
