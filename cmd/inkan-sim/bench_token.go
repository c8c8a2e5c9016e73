//go:build cgo

package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/miekg/pkcs11"

	"inkan/hsm"
	"inkan/signer/client"
)

// token measures a signer whose key is in SoftHSM beside the module itself.
func (b *bench) token(ctx context.Context) error {
	w, err := b.tokenWorld(ctx, false)
	if err != nil {
		return err
	}
	defer w.end()
	raw := make(map[int]*measurement)
	for _, clients := range []int{1, 4, 16} {
		if raw[clients], err = b.rawToken(w, "C_Sign, raw", clients); err != nil {
			return err
		}
	}
	if err := w.startSigner(); err != nil {
		return err
	}
	c := client.New(w.socket())
	entries := func() (uint64, error) {
		var n uint64
		err := c.Get(ctx, "/v1/agent", &looseAgent{&n})
		return n, err
	}
	for _, clients := range []int{1, 4, 16} {
		before, err := cpuOf(w.signer.cmd.Process.Pid)
		if err != nil {
			return err
		}
		n, err := entries()
		if err != nil {
			return err
		}
		if err := b.tokenSigner(ctx, c, "signer through its socket, SoftHSM", clients, raw[clients]); err != nil {
			return err
		}
		after, err := cpuOf(w.signer.cmd.Process.Pid)
		if err != nil {
			return err
		}
		total, err := entries()
		if err != nil {
			return err
		}
		if done := total - n; done > 0 {
			b.notes = append(b.notes, fmt.Sprintf("SoftHSM, %d clients: the daemon used %s of CPU for an action, its worker process with C_Sign %s.",
				clients, (after.daemon-before.daemon)/time.Duration(done), (after.worker-before.worker)/time.Duration(done)))
		}
	}
	return nil
}

// slowToken measures how much of a slow device's rate the signer leaves: 5 ms a
// signature, 16 at a time, and more clients than that.
func (b *bench) slowToken(ctx context.Context) error {
	w, err := b.tokenWorld(ctx, true)
	if err != nil {
		return err
	}
	defer w.end()
	if err := w.faults.Set("C_Sign slow 5"); err != nil {
		return err
	}
	const sessions, clients = 16, 64
	raw, err := b.rawToken(w, "C_Sign of 5 ms, raw", sessions)
	if err != nil {
		return err
	}
	if err := w.startSigner(); err != nil {
		return err
	}
	if err := b.tokenSigner(ctx, client.New(w.socket()), "signer through its socket, 5 ms device", clients, nil); err != nil {
		return err
	}
	b.notes = append(b.notes, fmt.Sprintf("A device of 5 ms a signature with %d sessions: the signer reaches %.0f %% of its rate.", sessions, 100*b.rows[len(b.rows)-1].PerSecond/raw.PerSecond))
	return nil
}

// tokenWorld has an agent whose key is in SoftHSM, behind the module that does
// harm on demand where faulty. Its signer is not started.
func (b *bench) tokenWorld(ctx context.Context, faulty bool) (*world, error) {
	w, err := newWorld(b.out, b.inkan, true)
	if err != nil {
		return nil, err
	}
	w.withFaults = faulty
	me, err := os.Executable()
	if err != nil {
		w.end()
		return nil, err
	}
	for _, step := range []func() error{
		func() error { return w.makeToken(ctx) }, func() error { return w.startTPM(ctx) }, func() error { return w.startIssuer(ctx) }, func() error { return w.inventory(ctx) },
		func() error { return w.signerConfig(map[string]string{"mm-07": me}) },
	} {
		if err := step(); err != nil {
			w.end()
			return nil, err
		}
	}
	return w, nil
}

func (b *bench) tokenSigner(ctx context.Context, c *client.Client, name string, clients int, raw *measurement) error {
	_, err := b.run(name, clients, raw, func(int) error {
		_, err := c.SignJSON(ctx, []byte(order(client.NewID())))
		return err
	})
	return err
}

// looseAgent takes the one member of the answer that is wanted.
type looseAgent struct{ entries *uint64 }

func (l *looseAgent) UnmarshalJSON(b []byte) error {
	i := bytes.Index(b, []byte(`"entries":`))
	if i < 0 {
		return errors.New("no entries in the signer's answer")
	}
	text := b[i+len(`"entries":`):]
	end := bytes.IndexAny(text, ",}")
	n, err := strconv.ParseUint(string(text[:end]), 10, 64)
	*l.entries = n
	return err
}

// rawToken calls C_Sign itself, a session for each client.
func (b *bench) rawToken(w *world, name string, clients int) (*measurement, error) {
	uri, err := hsm.ParseURI(w.keyURI)
	if err != nil {
		return nil, err
	}
	pin, err := os.ReadFile(w.hsm.PINFile)
	if err != nil {
		return nil, err
	}
	p := pkcs11.New(w.hsm.Module)
	if p == nil {
		return nil, errors.New("the module cannot be loaded")
	}
	defer p.Destroy()
	if err := p.Initialize(); err != nil {
		return nil, err
	}
	defer func() { _ = p.Finalize() }() // the process ends soon
	slots, err := p.GetSlotList(true)
	if err != nil {
		return nil, err
	}
	var slot uint
	for _, s := range slots {
		if info, err := p.GetTokenInfo(s); err == nil && info.Label == w.hsm.Label {
			slot = s
		}
	}
	sessions := make([]pkcs11.SessionHandle, clients)
	for i := range sessions {
		if sessions[i], err = p.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION); err != nil {
			return nil, err
		}
	}
	if err := p.Login(sessions[0], pkcs11.CKU_USER, strings.TrimSpace(string(pin))); err != nil {
		return nil, err
	}
	if err := p.FindObjectsInit(sessions[0], []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY), pkcs11.NewAttribute(pkcs11.CKA_ID, uri.ID)}); err != nil {
		return nil, err
	}
	found, _, err := p.FindObjects(sessions[0], 1)
	if err != nil || len(found) != 1 {
		return nil, fmt.Errorf("the key is not in the token: %w", err)
	}
	if err := p.FindObjectsFinal(sessions[0]); err != nil {
		return nil, err
	}
	digest := sha256.Sum256([]byte("raw"))
	return b.run(name, clients, nil, func(client int) error {
		if err := p.SignInit(sessions[client], []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_ECDSA, nil)}, found[0]); err != nil {
			return err
		}
		_, err := p.Sign(sessions[client], digest[:])
		return err
	})
}

// cpu is what a signer and its worker have used of the processor.
type cpu struct{ daemon, worker time.Duration }

func cpuOf(pid int) (cpu, error) {
	var c cpu
	own, err := ticks(pid)
	if err != nil {
		return c, err
	}
	c.daemon = own
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	if err != nil {
		return c, err
	}
	tasks, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	if err != nil {
		return c, err
	}
	for _, t := range tasks { // a child belongs to the thread that started it
		more, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%s/children", pid, t.Name()))
		if err == nil && t.Name() != strconv.Itoa(pid) {
			b = append(append(b, ' '), more...)
		}
	}
	for _, child := range strings.Fields(string(b)) {
		n, err := strconv.Atoi(child)
		if err != nil {
			return c, err
		}
		d, err := ticks(n)
		if err != nil {
			return c, err
		}
		c.worker += d
	}
	return c, nil
}
