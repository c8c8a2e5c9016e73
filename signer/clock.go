package signer

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"inkan/internal/clock"
	"inkan/internal/durable"
	"inkan/internal/strictjson"
	"inkan/scope"
)

// clockFile remembers in the state directory where the clock was in this boot, so
// that it is found out if it was set while the signer did not run.
const clockFile = "clock.json"

// clockJitter is by how much two looks at the clocks differ for no reason.
const clockJitter = 100 * time.Millisecond

type savedClock struct {
	Boot   string `json:"boot"`   // boot_id of the kernel
	Offset string `json:"offset"` // wall clock less boot clock, as a Go duration
}

func bootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b)), err
}

func openClock(c *Config) (*clock.Watch, error) {
	expected, err := readClock(filepath.Join(c.StateDir, clockFile))
	if err != nil {
		return nil, err
	}
	return clock.New(c.Clock.Source, c.Clock.Chrony, expected)
}

func readClock(path string) (time.Duration, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	var s savedClock
	if err := strictjson.Unmarshal(b, 4<<10, &s); err != nil {
		return 0, fmt.Errorf("%s: %w: remove it", path, err)
	}
	boot, err := bootID()
	if err != nil || s.Boot != boot {
		return 0, err
	}
	offset, err := time.ParseDuration(s.Offset)
	if err != nil {
		return 0, fmt.Errorf("%s: %w: remove it", path, err)
	}
	return offset, nil
}

// saveClock remembers where the clock is, as far as it is in order.
func (s *Signer) saveClock() error {
	boot, err := bootID()
	if err != nil {
		return err
	}
	b, err := json.Marshal(savedClock{boot, s.clock.Expected().String()})
	if err != nil {
		return err
	}
	return durable.WriteFile(filepath.Join(s.config.StateDir, clockFile), b, 0o600)
}

// watchClock watches the clock until ctx ends, and says when it was set.
func (s *Signer) watchClock(ctx context.Context) {
	go s.clock.Run(ctx)
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	var saved time.Duration
	said := false
	for {
		if at := s.clock.Expected(); (at - saved).Abs() > clockJitter {
			if err := s.saveClock(); err != nil {
				s.log.ErrorContext(ctx, "where the clock is could not be saved", "error", err)
			}
			saved = at
		}
		_, jump, _ := s.clock.Now()
		if jump != nil && !said {
			s.log.ErrorContext(ctx, "all but cancels are refused", "clock", jump.String())
		}
		said = jump != nil
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// clockRefuses says what is known of the clock, and why an action is refused for it.
func (a *Agent) clockRefuses(action *scope.Action) (*scope.Clock, *scope.Refusal) {
	state, jump, why := a.clock.Now()
	if jump != nil && !action.ReducesRisk() {
		return state, &scope.Refusal{Rule: scope.RuleClockJump, Value: jump.By.String(),
			Message: jump.String() + ": only cancels pass until its source agrees with it, or an operator does (inkan signer recover)"}
	}
	r := state.Refuses(action, a.maxDivergence)
	if r != nil && why != nil {
		r.Message += " (" + why.Error() + ")"
	}
	return state, r
}

// acceptClock takes the clock for right as it is, for an operator, and says so in
// every agent's record.
func (s *Signer) acceptClock(ctx context.Context, named *Agent, jump *clock.Jump, reason, by string) (*Recovered, error) {
	var out *Recovered
	for _, ac := range s.config.Agents {
		a := s.agents[ac.Name]
		cred := a.current.Load()
		if cred == nil {
			if a == named {
				return nil, &scope.Refusal{Rule: RuleNoCertificate, Message: "the agent has no certificate yet, under which it would be recorded"}
			}
			continue
		}
		r := scope.Recovery{Cause: scope.CauseClock, Found: jump.String(), Reason: reason, By: by}
		e, err := r.Event(cred.scope)
		if err != nil {
			return nil, err
		}
		n, err := a.log.Event(ctx, e, cred.identity)
		if err != nil {
			return nil, fmt.Errorf("agent %s: %w", a.name, err)
		}
		if a == named {
			out = &Recovered{a.name, n, r.Cause, r.Found}
		}
	}
	if err := s.clock.Accept(); err != nil {
		return nil, err
	}
	s.log.WarnContext(ctx, "the clock was accepted as it is", "found", jump.String(), "reason", reason, "by", by)
	return out, nil
}
