package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"inkan/audit"
	"inkan/scope"
	"inkan/signer/client"
)

// runCrash has many clients order while the signer is killed with -9, again
// and again. Then every acknowledged order must be in the record once, the record
// must verify, and the venue must accept nothing that the record does not have.
func runCrash(ctx context.Context, out io.Writer, inkan string, orders, clients, kills int, asJSON bool) error {
	w, err := newWorld(out, inkan, asJSON)
	if err != nil {
		return err
	}
	defer w.end()
	me, err := os.Executable()
	if err != nil {
		return err
	}
	w.lifetime = "1h"
	for _, step := range []func() error{
		func() error { return w.startTPM(ctx) }, func() error { return w.startIssuer(ctx) }, func() error { return w.inventory(ctx) },
		func() error { return w.signerConfig(map[string]string{"mm-07": me}) }, w.startSigner,
	} {
		if err := step(); err != nil {
			return err
		}
	}
	w.title("%d orders from %d clients, the signer killed with -9 %d times", orders, clients, kills)
	strikes := make([]strike, kills)
	for i := range strikes {
		strikes[i] = strike{"killed; starting again", func(func() int64) error {
			if err := syscall.Kill(w.signer.cmd.Process.Pid, syscall.SIGKILL); err != nil {
				return err
			}
			<-w.signer.done
			return w.startSigner()
		}}
	}
	acknowledged, retries, err := w.orderUnderFire(ctx, orders, clients, strikes)
	if err != nil {
		return err
	}
	w.signer.stop() // in order, so that what waits is written
	return w.judge(ctx, out, acknowledged, retries, kills, asJSON)
}

// strike is something bad that happens while orders are sent. retries tells how
// often a client had to try again so far.
type strike struct {
	what string
	do   func(retries func() int64) error
}

// orderUnderFire sends orders while the strikes happen, one after a share of
// the orders each, whatever the machine's speed. It returns the JWS of every acknowledged order by its id.
func (w *world) orderUnderFire(ctx context.Context, orders, clients int, strikes []strike) (map[string]string, int64, error) {
	c := client.New(w.socket())
	var mu sync.Mutex
	acknowledged := make(map[string]string)
	var next, retries atomic.Int64
	var wg sync.WaitGroup
	done := make(chan struct{})
	failed := make(chan error, clients+1)
	for range clients {
		wg.Go(func() {
			for next.Add(1) <= int64(orders) {
				id := client.NewID()
				for { // an order is sent until it is answered; its id makes it one order
					s, err := c.SignJSON(ctx, []byte(order(id)))
					if err == nil {
						mu.Lock()
						acknowledged[id] = s.JWS
						mu.Unlock()
						break
					}
					if strings.Contains(err.Error(), "allowed") || ctx.Err() != nil {
						failed <- err
						return
					}
					retries.Add(1)
					time.Sleep(5 * time.Millisecond) // the signer is down, or its device
				}
			}
		})
	}
	go func() { wg.Wait(); close(done) }()
	for i, x := range strikes {
		target := int64(orders) * int64(i+1) / int64(len(strikes)+1)
		for next.Load() < target {
			select {
			case err := <-failed:
				return nil, 0, err
			case <-time.After(time.Millisecond):
			}
		}
		w.say("   after %d orders: %s", next.Load(), x.what)
		if err := x.do(retries.Load); err != nil {
			return nil, 0, fmt.Errorf("%s: %w", x.what, err)
		}
	}
	select {
	case err := <-failed:
		return nil, 0, err
	case <-done:
	}
	return acknowledged, retries.Load(), nil
}

func (w *world) judge(ctx context.Context, out io.Writer, acknowledged map[string]string, retries int64, kills int, asJSON bool) error {
	log := w.path("state", "mm-07", "log.db")
	s, err := audit.OpenSnapshot(ctx, log)
	if err != nil {
		return err
	}
	defer s.Close()
	entries, unsigned := 0, 0
	inLog := make(map[string]int)
	for e, err := range s.Entries(ctx) {
		if err != nil {
			return err
		}
		st, err := scope.ParseStatement(e.Statement)
		if err != nil {
			return err
		}
		entries++
		inLog[st.ID]++
		if e.JWS == "" {
			unsigned++
		}
		if jws, ok := acknowledged[st.ID]; ok {
			if parts := strings.Split(jws, "."); string(decode(parts[1])) != string(e.Statement) {
				return fmt.Errorf("order %s was acknowledged with another statement than the record has", st.ID)
			}
		}
	}
	for id := range acknowledged {
		if inLog[id] != 1 {
			return fmt.Errorf("order %s was acknowledged and stands in the record %d times", id, inLog[id])
		}
	}
	if entries != len(acknowledged) {
		return fmt.Errorf("%d orders were acknowledged, %d stand in the record", len(acknowledged), entries)
	}
	verified, err := w.run(ctx, "audit", "verify", "--log", log, "--ca", w.path("issuer", "ca.pem"), "--json")
	if err != nil {
		return err
	}
	var report map[string]any
	if err := json.Unmarshal([]byte(verified), &report); err != nil {
		return err
	}
	if asJSON {
		return printJSON(out, map[string]any{"acknowledged": len(acknowledged), "entries": entries, "kills": kills, "retries": retries, "signature_not_stored": unsigned, "verified": report["verified"]})
	}
	w.say("%d orders acknowledged, each once in the record of %d entries; %d kills, %d tries again; %d signatures not stored; the record verifies.", len(acknowledged), entries, kills, retries, unsigned)
	return nil
}
