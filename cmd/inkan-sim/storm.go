package main

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"inkan/internal/jws"
	"inkan/signer"
	"inkan/simulator"
)

// stormScope has limits over time, so that a debit that was made twice would show.
const stormScope = scopeYAML + `max_notional_per_window:
  - {currency: EUR, amount: "999999999", window: {rolling_s: 86400}}
max_orders_per_window:
  - {count: 1000000, window: {rolling_s: 86400}}
`

// runStorm has many clients order while the token has its bad days. Service
// must resume by itself each time, in the same signer process; every acknowledged order must be in the
// record once and its signature must verify.
func runStorm(ctx context.Context, out io.Writer, inkan string, orders, clients int, hang time.Duration, asJSON bool) error {
	w, err := newWorld(out, inkan, asJSON)
	if err != nil {
		return err
	}
	defer w.end()
	me, err := os.Executable()
	if err != nil {
		return err
	}
	w.lifetime, w.scope, w.withFaults = "1h", stormScope, true
	for _, step := range []func() error{
		func() error { return w.makeToken(ctx) }, func() error { return w.startTPM(ctx) }, func() error { return w.startIssuer(ctx) }, func() error { return w.inventory(ctx) },
		func() error { return w.signerConfig(map[string]string{"mm-07": me}) }, w.startSigner,
	} {
		if err := step(); err != nil {
			return err
		}
	}
	w.title("%d orders from %d clients, through the bad days of a token", orders, clients)
	pid := w.signer.cmd.Process.Pid
	acknowledged, retries, err := w.orderUnderFire(ctx, orders, clients, w.badDays(ctx, hang))
	if err != nil {
		return err
	}
	status, err := w.tokenStatus(ctx)
	if err != nil {
		return err
	}
	select {
	case <-w.signer.done:
		return errors.New("the signer's process ended")
	default:
	}
	if w.signer.cmd.Process.Pid != pid {
		return errors.New("the signer was started anew")
	}
	if err := w.signaturesVerify(acknowledged); err != nil {
		return err
	}
	w.signer.stop() // in order, so that what waits is written
	w.say("the signer ran on as process %d; its token's worker is of generation %d, %d attempts failed, %d signatures were released, all verify", pid, status.Generation, status.Failures, status.Signatures)
	return w.judge(ctx, out, acknowledged, retries, 0, asJSON)
}

// badDays are what happens to a token. Each ends with the token as it was.
func (w *world) badDays(ctx context.Context, hang time.Duration) []strike {
	tokens := filepath.Join(w.hsm.Dir, "tokens")
	// harm lasts until the signer has noticed it: a client was told to try again.
	harm := func(fault string, lasts time.Duration) func(func() int64) error {
		return func(retries func() int64) error {
			if err := w.faults.Set(fault); err != nil {
				return err
			}
			return errors.Join(w.noticed(ctx, retries, lasts), w.faults.Heal())
		}
	}
	return []strike{
		{"the token's directory is moved away, and back", func(retries func() int64) error {
			if err := os.Rename(tokens, tokens+".away"); err != nil {
				return err
			}
			return errors.Join(w.noticed(ctx, retries, 0), os.Rename(tokens+".away", tokens))
		}},
		{"the worker is killed with -9", func(func() int64) error {
			s, err := w.tokenStatus(ctx)
			if err != nil {
				return err
			}
			return syscall.Kill(s.WorkerPID, syscall.SIGKILL)
		}},
		{fmt.Sprintf("the module hangs for %s", hang), harm("C_Sign hang", hang)},
		{"all sessions are closed underneath", func(func() int64) error { return w.faults.Set("C_Sign !sessions") }},
		{"the module crashes, again and again", harm("C_Sign crash", 0)},
		{"the module signs wrongly", harm("C_Sign wrong", 0)},
		{"the module answers CKR_DEVICE_ERROR", harm("C_Sign rv 0x30", 0)},
	}
}

// noticed waits until a client was told to try again, and for at least a time.
func (w *world) noticed(ctx context.Context, retries func() int64, lasts time.Duration) error {
	before, begun := retries(), time.Now()
	for retries() == before || time.Since(begun) < lasts {
		if time.Since(begun) > lasts+time.Minute {
			return errors.New("nobody noticed for a minute: do the orders suffice?")
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(10 * time.Millisecond):
		}
	}
	return nil
}

// tokenStatus asks the signer as an operator does.
func (w *world) tokenStatus(ctx context.Context) (*signer.DeviceStatus, error) {
	text, err := w.run(ctx, "status", "--socket", w.socket(), "--json")
	if err != nil {
		return nil, err
	}
	var s struct {
		Agents []struct {
			Device signer.DeviceStatus `json:"device"`
		} `json:"agents"`
	}
	if err := json.Unmarshal([]byte(text), &s); err != nil {
		return nil, err
	}
	if len(s.Agents) != 1 {
		return nil, fmt.Errorf("status shows %d agents", len(s.Agents))
	}
	return &s.Agents[0].Device, nil
}

// signaturesVerify checks what was acknowledged under the agent's certificate.
func (w *world) signaturesVerify(acknowledged map[string]string) error {
	text, err := os.ReadFile(w.path("state", "mm-07", "action.pem"))
	if err != nil {
		return err
	}
	block, _ := pem.Decode(text)
	if block == nil {
		return errors.New("the certificate is not in PEM")
	}
	leaf, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return err
	}
	alg, _, err := jws.Algorithm(leaf.PublicKey)
	if err != nil {
		return err
	}
	seen := make(map[[32]byte]bool)
	for id, compact := range acknowledged {
		input, signature := compact[:strings.LastIndexByte(compact, '.')], compact[strings.LastIndexByte(compact, '.')+1:]
		if err := jws.Verify(leaf.PublicKey, alg, []byte(input), decode(signature)); err != nil {
			return fmt.Errorf("order %s: a wrong signature was released: %w", id, err)
		}
		sum := sha256.Sum256([]byte(input))
		if seen[sum] {
			return fmt.Errorf("order %s: two orders have one statement", id)
		}
		seen[sum] = true
	}
	return nil
}

// withFaultModule puts a module that does harm on demand before the token's.
func (w *world) withFaultModule(ctx context.Context) error {
	var err error
	if w.faults, err = simulator.NewFaultModule(ctx, w.hsm); err != nil {
		return err
	}
	w.hsm.Module = w.faults.Module
	for _, v := range w.faults.Env() { // the signer passes its environment on to the worker
		name, value, _ := strings.Cut(v, "=")
		if err := os.Setenv(name, value); err != nil {
			return err
		}
	}
	return nil
}
