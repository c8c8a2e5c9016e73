//go:build cgo

package hsm_test

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"inkan/hsm"
	"inkan/simulator"
)

// The test binary serves as its own worker, as the command does.
func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == "hsm-worker" {
		if err := hsm.RunWorker(os.NewFile(3, "parent")); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

func uri(s *simulator.SoftHSM) string {
	return (&hsm.URI{Token: s.Label, Module: s.Module, PINSource: "file:" + s.PINFile}).String()
}

func options(s *simulator.SoftHSM) hsm.Options {
	return hsm.Options{Env: []string{"SOFTHSM2_CONF=" + s.Config}, Sessions: 4}
}

func open(t *testing.T, s *simulator.SoftHSM, o hsm.Options) *hsm.Token {
	t.Helper()
	k, err := hsm.Open(uri(s), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = k.Close() })
	return k
}

func sign(k *hsm.Key) error {
	d := sha256.Sum256([]byte("an order"))
	_, err := k.Sign(rand.Reader, d[:], crypto.SHA256) // verified inside
	return err
}

// suite is what every module must do; missing lists the algorithms that it has not.
func suite(t *testing.T, token *hsm.Token, missing ...hsm.Algorithm) {
	for _, c := range []struct {
		algorithm hsm.Algorithm
		opts      []crypto.SignerOpts
	}{
		{hsm.P256, []crypto.SignerOpts{crypto.SHA256}},
		{hsm.P384, []crypto.SignerOpts{crypto.SHA384}},
		{hsm.RSA2048, []crypto.SignerOpts{crypto.SHA256, crypto.SHA512, &rsa.PSSOptions{Hash: crypto.SHA256}, &rsa.PSSOptions{Hash: crypto.SHA384}}},
		{hsm.RSA3072, []crypto.SignerOpts{crypto.SHA384, &rsa.PSSOptions{Hash: crypto.SHA384}}},
		{hsm.RSA4096, []crypto.SignerOpts{crypto.SHA512, &rsa.PSSOptions{Hash: crypto.SHA512}}},
		{hsm.Ed25519, []crypto.SignerOpts{crypto.Hash(0)}},
	} {
		t.Run(string(c.algorithm), func(t *testing.T) {
			made, err := token.GenerateKey(c.algorithm, "test", nil)
			if slices.Contains(missing, c.algorithm) {
				const mechanismInvalid = 0x70
				if code, ok := errors.AsType[*hsm.CodeError](err); !ok || code.Code != mechanismInvalid {
					t.Errorf("got %v, want CKR_MECHANISM_INVALID", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			k, err := token.Key(made.Attributes().ID)
			if err != nil {
				t.Fatal(err)
			}
			for _, o := range c.opts {
				in := make([]byte, 32)
				if h := o.HashFunc(); h != 0 {
					in = make([]byte, h.Size())
				}
				if _, err := k.Sign(rand.Reader, in, o); err != nil {
					t.Errorf("%v: %v", o, err)
				}
				if o.HashFunc() != 0 {
					if _, err := k.Sign(rand.Reader, in[1:], o); err == nil {
						t.Errorf("%v: a short digest was signed", o)
					}
				}
			}
		})
	}
	if list, err := token.List(); err != nil || len(list) != 6-len(missing) {
		t.Errorf("list: %d keys, %v", len(list), err)
	}
	if _, err := token.Key([]byte("none")); !errors.Is(err, hsm.ErrNotFound) {
		t.Errorf("a missing key: %v", err)
	}
}

func TestSoftHSM(t *testing.T) {
	s := simulator.SoftHSMForTest(t)
	suite(t, open(t, s, options(s)))
}

func TestP11KitRemote(t *testing.T) {
	const client = "/usr/lib/x86_64-linux-gnu/pkcs11/p11-kit-client.so"
	if _, err := os.Stat(client); err != nil {
		t.Fatal("p11-kit is missing: apt-get install p11-kit p11-kit-modules")
	}
	s := simulator.SoftHSMForTest(t)
	dir, err := os.MkdirTemp("", "p11") // short, for the socket's sake
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	sock := filepath.Join(dir, "s")
	cmd := exec.Command("p11-kit", "server", "-f", "-n", sock, "--provider", s.Module, "pkcs11:token="+s.Label)
	cmd.Env = append(os.Environ(), "SOFTHSM2_CONF="+s.Config)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	await(t, func() bool { _, err := os.Stat(sock); return err == nil })
	o := hsm.Options{Module: client, Sessions: 4, Env: []string{"P11_KIT_SERVER_ADDRESS=unix:path=" + sock}}
	suite(t, open(t, s, o), hsm.Ed25519) // p11-kit does not pass EdDSA on
}

func await(t *testing.T, ready func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ready() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatal("not ready after twenty seconds")
		}
	}
}

func TestWorkerKilled(t *testing.T) {
	s := simulator.SoftHSMForTest(t)
	token := open(t, s, options(s))
	k, err := token.GenerateKey(hsm.P256, "test", nil)
	if err != nil {
		t.Fatal(err)
	}
	before := token.Stats()
	if err := syscall.Kill(before.WorkerPID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := sign(k); err != nil {
		t.Errorf("after kill -9 of the worker: %v", err)
	}
	if after := token.Stats(); after.Generation != before.Generation+1 {
		t.Errorf("generation %d after %d", after.Generation, before.Generation)
	}
}

func TestTokenDirectoryMovedAway(t *testing.T) {
	s := simulator.SoftHSMForTest(t)
	token := open(t, s, options(s))
	k, err := token.GenerateKey(hsm.P256, "test", nil)
	if err != nil {
		t.Fatal(err)
	}
	tokens := filepath.Join(s.Dir, "tokens")
	if err := os.Rename(tokens, tokens+".away"); err != nil {
		t.Fatal(err)
	}
	await(t, func() bool { return sign(k) != nil })
	if err := os.Rename(tokens+".away", tokens); err != nil {
		t.Fatal(err)
	}
	await(t, func() bool { return sign(k) == nil })
}

func TestWrongPIN(t *testing.T) {
	s := simulator.SoftHSMForTest(t)
	const secret = "not-the-pin-93"
	if err := os.WriteFile(s.PINFile, []byte(secret+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := hsm.Open(uri(s), options(s))
	if !errors.Is(err, hsm.ErrPIN) {
		t.Errorf("a wrong PIN: %v", err)
	}
	if strings.Contains(fmt.Sprint(err), secret) {
		t.Error("the error shows the PIN")
	}
}

func TestKeysThatLeaveAreRefused(t *testing.T) {
	s := simulator.SoftHSMForTest(t)
	pin, err := os.ReadFile(s.PINFile)
	if err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(t.TempDir(), "key.pem")
	if b, err := exec.Command("openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", out).CombinedOutput(); err != nil {
		t.Fatalf("openssl: %v: %s", err, b)
	}
	cmd := exec.Command("softhsm2-util", "--import", out, "--token", s.Label, "--label", "imported", "--id", "a1", "--pin", strings.TrimSpace(string(pin)))
	cmd.Env = append(os.Environ(), "SOFTHSM2_CONF="+s.Config)
	if b, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("softhsm2-util: %v: %s", err, b)
	}
	token := open(t, s, options(s))
	_, err = token.Key([]byte{0xa1})
	refused, ok := errors.AsType[*hsm.AttributeError](err)
	if !ok || refused.Attribute != "CKA_ALWAYS_SENSITIVE" {
		t.Errorf("an imported key: %v", err)
	}
}

func TestManyCallers(t *testing.T) {
	s := simulator.SoftHSMForTest(t)
	token := open(t, s, options(s))
	k, err := token.GenerateKey(hsm.P256, "test", nil)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	begin := time.Now()
	const callers, each = 16, 200
	for range callers {
		wg.Go(func() {
			for range each {
				if err := sign(k); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	t.Logf("%.0f verified signatures a second at %d callers", callers*each/time.Since(begin).Seconds(), callers)
}
