//go:build cgo

package hsm_test

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"inkan/hsm"
	"inkan/simulator"
)

// faulty is a SoftHSM behind the module that does harm on demand.
type faulty struct {
	*simulator.SoftHSM
	module *simulator.FaultModule
	opt    hsm.Options
}

func newFaulty(t *testing.T) *faulty {
	t.Helper()
	f := &faulty{SoftHSM: simulator.SoftHSMForTest(t)}
	m, err := simulator.NewFaultModule(t.Context(), f.SoftHSM)
	if err != nil {
		t.Fatal(err)
	}
	f.module = m
	f.opt = options(f.SoftHSM)
	f.opt.Module = m.Module
	f.opt.Timeout = time.Second
	f.opt.Env = append(f.opt.Env, m.Env()...)
	return f
}

func (f *faulty) set(t *testing.T, line string) {
	t.Helper()
	if err := f.module.Set(line); err != nil {
		t.Fatal(err)
	}
}

func (f *faulty) heal(t *testing.T) {
	t.Helper()
	if err := f.module.Heal(); err != nil {
		t.Fatal(err)
	}
}

// TestFaultOnce: one fault costs nothing, or one error, and never a wrong signature.
func TestFaultOnce(t *testing.T) {
	f := newFaulty(t)
	token := open(t, f.SoftHSM, f.opt)
	k, err := token.GenerateKey(hsm.P256, "test", nil)
	if err != nil {
		t.Fatal(err)
	}
	other, err := token.GenerateKey(hsm.P256, "other", nil)
	if err != nil {
		t.Fatal(err)
	}
	type row struct {
		fault string
		err   error // nil: made good by the retry
		again bool  // a new worker was needed
	}
	rows := []row{
		{"C_Sign !crash", nil, true},
		{"C_Sign !hang", hsm.ErrDeadline, true},
		{"C_Sign !slow 50", nil, false},
		{"C_Sign !wrong", nil, true},
		{"C_Sign !sessions", nil, true},
		{"C_SignInit !hang", hsm.ErrDeadline, true},
		{fmt.Sprintf("C_SignInit !other %x", other.Attributes().ID), nil, true},
		{"C_Sign !rv 0x30", nil, false}, // a throttled device: tried again in place
		{"C_Sign !rv 0x06", nil, false},
	}
	for _, code := range []string{"0xb3", "0xb0", "0x101", "0x82", "0x60", "0x90", "0x32", "0xe0", "0xe1", "0x05", "0x190"} {
		rows = append(rows, row{"C_Sign !rv " + code, nil, true}, row{"C_SignInit !rv " + code, nil, true})
	}
	for _, r := range rows {
		t.Run(r.fault, func(t *testing.T) {
			before := token.Stats().Generation
			f.set(t, r.fault)
			if err := sign(k); !errors.Is(err, r.err) {
				t.Errorf("got %v, want %v", err, r.err)
			}
			f.heal(t)
			if err := sign(k); err != nil {
				t.Errorf("afterwards: %v", err)
			}
			if again := token.Stats().Generation != before; again != r.again {
				t.Errorf("a new worker: %v, want %v", again, r.again)
			}
		})
	}
}

// TestFaultStays: while a fault lasts there is an error and no signature; the
// breaker opens, and service resumes by itself.
func TestFaultStays(t *testing.T) {
	f := newFaulty(t)
	token := open(t, f.SoftHSM, f.opt)
	k, err := token.GenerateKey(hsm.P256, "test", nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, fault := range []string{"C_Sign wrong", "C_Sign crash", "C_Sign rv 0x05", "C_OpenSession rv 0x30", "C_Login rv 0x05", "C_FindObjectsInit crash"} {
		t.Run(fault, func(t *testing.T) {
			f.set(t, fault)
			if strings.HasPrefix(fault, "C_Sign") {
				if err := sign(k); err == nil {
					t.Fatal("signed")
				}
			} else if p, err := os.FindProcess(token.Stats().WorkerPID); err != nil {
				t.Fatal(err)
			} else if err := p.Kill(); err != nil {
				t.Fatal(err)
			}
			await(t, func() bool { return errors.Is(sign(k), hsm.ErrUnavailable) })
			if s := token.Stats(); s.Breaker != "open" || s.LastError == "" {
				t.Errorf("stats: %+v", s)
			}
			f.heal(t)
			await(t, func() bool { return sign(k) == nil })
			if s := token.Stats(); s.Breaker != "closed" {
				t.Errorf("stats: %+v", s)
			}
		})
	}
}

// TestPINIsAskedOnce: a refused PIN is not offered again, since tokens lock.
func TestPINIsAskedOnce(t *testing.T) {
	f := newFaulty(t)
	token := open(t, f.SoftHSM, f.opt)
	k, err := token.GenerateKey(hsm.P256, "test", nil)
	if err != nil {
		t.Fatal(err)
	}
	f.set(t, "C_Login rv 0xa4")
	p, err := os.FindProcess(token.Stats().WorkerPID)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Kill(); err != nil {
		t.Fatal(err)
	}
	await(t, func() bool { return errors.Is(sign(k), hsm.ErrPIN) })
	before := token.Stats().Generation
	if err := sign(k); !errors.Is(err, hsm.ErrPIN) {
		t.Errorf("got %v", err)
	}
	if after := token.Stats().Generation; after != before {
		t.Errorf("%d more workers were started with a refused PIN", after-before)
	}
}
