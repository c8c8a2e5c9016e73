package journal_test

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"inkan/attest"
	"inkan/journal"
	"inkan/simulator"
	"inkan/tpm"
)

// bench is a TPM whose signatures go to a journal, and an agent's key in it.
type bench struct {
	sim  *simulator.TPM
	dev  *tpm.Device
	j    *journal.Journal
	path string
	file []byte // of the key
	key  *tpm.Key
	seen map[[32]byte]bool // what the agent's record has
}

func newBench(t *testing.T) *bench {
	t.Helper()
	b := &bench{sim: simulator.TPMForTest(t), path: filepath.Join(t.TempDir(), journal.FileName), seen: make(map[[32]byte]bool)}
	var err error
	if b.dev, err = tpm.Open(b.sim.Address); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = b.dev.Close() })
	if b.j, err = journal.Open(b.path); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = b.j.Close() })
	if err := b.dev.StartAudit(b.j); err != nil {
		t.Fatal(err)
	}
	if b.file, _, err = b.dev.CreateKey(tpm.SigningTemplate()); err != nil {
		t.Fatal(err)
	}
	if b.key, err = b.dev.LoadKey(b.file, nil); err != nil {
		t.Fatal(err)
	}
	b.testify(t)
	return b
}

func (b *bench) testify(t *testing.T) {
	t.Helper()
	if _, err := b.dev.Testify([]byte("x")); err != nil {
		t.Fatal(err)
	}
}

// signs signs a message that then stands in the record.
func (b *bench) signs(t *testing.T, messages ...string) {
	t.Helper()
	for _, m := range messages {
		b.seen[sha256.Sum256([]byte(m))] = true
		if _, err := crypto.SignMessage(b.key, nil, []byte(m), crypto.SHA256); err != nil {
			t.Fatal(err)
		}
	}
}

// behind signs with the agent's key as root would: beside the signer.
func (b *bench) behind(t *testing.T, message string) {
	t.Helper()
	b.dev.Release()
	d, err := tpm.Open(b.sim.Address)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	k, err := d.LoadKey(b.file, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := crypto.SignMessage(k, nil, []byte(message), crypto.SHA256); err != nil {
		t.Fatal(err)
	}
}

// tool runs one of the tpm2-tools on the same TPM.
func (b *bench) tool(t *testing.T, dir string, args ...string) {
	t.Helper()
	if _, err := exec.LookPath(args[0]); err != nil {
		t.Fatalf("%s is missing: apt-get install tpm2-tools", args[0])
	}
	b.dev.Release()
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Env, cmd.Dir = append(os.Environ(), "TPM2TOOLS_TCTI=swtpm:path="+b.sim.Address), dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", args, err, out)
	}
	for _, kind := range []string{"-t", "-l", "-s"} { // swtpm has no resource manager
		_ = exec.Command("env", "TPM2TOOLS_TCTI=swtpm:path="+b.sim.Address, "tpm2_flushcontext", kind).Run() // there may be none
	}
}

func (b *bench) verify(t *testing.T) (*journal.Report, error) {
	t.Helper()
	text, err := os.ReadFile(b.path)
	if err != nil {
		t.Fatal(err)
	}
	return b.verifyText(t, text)
}

func (b *bench) verifyText(t *testing.T, text []byte) (*journal.Report, error) {
	t.Helper()
	ak, err := b.dev.AKPublic()
	if err != nil {
		t.Fatal(err)
	}
	name, err := attest.KeyName(ak)
	if err != nil {
		t.Fatal(err)
	}
	key, err := attest.KeyName(b.key.PublicArea())
	if err != nil {
		t.Fatal(err)
	}
	return journal.Verify(bytes.NewReader(text), journal.Options{AK: map[string]bool{hex.EncodeToString(name): true}, Keys: map[string]bool{hex.EncodeToString(key): true},
		Explain: func(s journal.Signature) bool { return b.seen[s.Digest] }})
}

func (b *bench) refuses(t *testing.T, rule journal.Rule) {
	t.Helper()
	if r, err := b.verify(t); !errors.Is(err, &journal.Contradiction{Rule: rule}) {
		t.Errorf("%+v, %v; %s is expected", r, err, rule)
	}
}

func TestHonestJournal(t *testing.T) {
	b := newBench(t)
	b.testify(t) // about nothing
	b.signs(t, "one", "eyJ two", "three")
	b.testify(t)
	b.testify(t)
	b.dev.Release()
	b.signs(t, "four")
	if _, err := b.key.Sign(nil, []byte("not a digest"), crypto.SHA256); err == nil {
		t.Error("signed what is no digest")
	}
	b.testify(t)
	b.signs(t, "five")
	r, err := b.verify(t)
	if err != nil || r.Signatures != 4 || r.Own != 4 || r.After != 1 || len(r.Lost) != 0 || r.From.IsZero() || r.Until.Before(r.From) {
		t.Errorf("%+v, %v", r, err)
	}
	text, err := os.ReadFile(b.path)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(text, []byte("eyJ two")) || bytes.Count(text, []byte(`"message"`)) != 4 {
		t.Errorf("statements are in the record, and need not be in the journal:\n%s", text)
	}
}

func TestOffTheBooks(t *testing.T) {
	for name, c := range map[string]struct {
		do   func(*testing.T, *bench)
		rule journal.Rule
	}{
		"with the agent's key, among others": {func(t *testing.T, b *bench) { b.signs(t, "one"); b.behind(t, "x"); b.signs(t, "two") }, journal.RuleOffTheBooks},
		"with the agent's key, alone":        {func(t *testing.T, b *bench) { b.behind(t, "x") }, journal.RuleOffTheBooks},
		"with tpm2_sign": {func(t *testing.T, b *bench) {
			b.signs(t, "one")
			dir := t.TempDir()
			if err := os.WriteFile(filepath.Join(dir, "order"), []byte("x"), 0o600); err != nil {
				t.Fatal(err)
			}
			b.tool(t, dir, "tpm2_createprimary", "-C", "o", "-G", "ecc", "-c", "srk.ctx", "-Q")
			b.tool(t, dir, "tpm2_create", "-C", "srk.ctx", "-G", "ecc:ecdsa", "-u", "k.pub", "-r", "k.priv", "-c", "k.ctx", "-Q")
			b.tool(t, dir, "tpm2_sign", "-c", "k.ctx", "-g", "sha256", "-o", "sig", "order")
		}, journal.RuleOffTheBooks},
		"with the audit switched off": {func(t *testing.T, b *bench) {
			b.signs(t, "one")
			b.tool(t, t.TempDir(), "tpm2_setcommandauditstatus", "-C", "o", "--clear-list", "TPM2_CC_Sign")
			b.behind(t, "x")
		}, journal.RuleAuditOff},
		"with the audit switched off and on again": {func(t *testing.T, b *bench) {
			b.signs(t, "one")
			b.tool(t, t.TempDir(), "tpm2_setcommandauditstatus", "-C", "o", "--clear-list", "TPM2_CC_Sign")
			b.behind(t, "x")
			b.tool(t, t.TempDir(), "tpm2_setcommandauditstatus", "-C", "o", "TPM2_CC_Sign")
		}, journal.RuleOffTheBooks},
		"and the digest taken":          {func(t *testing.T, b *bench) { b.signs(t, "one"); b.behind(t, "x"); b.take(t) }, journal.RuleTaken},
		"and the digest taken, then on": {func(t *testing.T, b *bench) { b.behind(t, "x"); b.take(t); b.signs(t, "one") }, journal.RuleTaken},
		"and the hash changed, which empties the digest": {func(t *testing.T, b *bench) {
			b.behind(t, "x")
			b.tool(t, t.TempDir(), "tpm2_setcommandauditstatus", "-C", "o", "-g", "sha384")
			b.tool(t, t.TempDir(), "tpm2_setcommandauditstatus", "-C", "o", "-g", "sha256")
		}, journal.RuleOffTheBooks},
		"and written into the journal": {func(t *testing.T, b *bench) {
			d, err := tpm.Open(b.sim.Address)
			if err != nil {
				t.Fatal(err)
			}
			defer d.Close()
			b.dev.Release()
			if err := d.StartAudit(b.j); err != nil {
				t.Fatal(err)
			}
			k, err := d.LoadKey(b.file, nil)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := crypto.SignMessage(k, nil, []byte("an order of root's own"), crypto.SHA256); err != nil {
				t.Fatal(err)
			}
		}, journal.RuleUnexplained},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			c.do(t, b)
			b.testify(t)
			b.refuses(t, c.rule)
		})
	}
}

// take takes the TPM's digest with a key of one's own.
func (b *bench) take(t *testing.T) {
	t.Helper()
	dir := t.TempDir()
	b.tool(t, dir, "tpm2_createprimary", "-C", "e", "-G", "ecc:ecdsa", "-a", "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|sign", "-c", "k.ctx", "-Q")
	b.tool(t, dir, "tpm2_getcommandauditdigest", "-c", "k.ctx", "-g", "sha256", "-m", "att", "-s", "sig")
}

// TestChangedJournal: whoever has the file can change it, and cannot make it fit.
func TestChangedJournal(t *testing.T) {
	b := newBench(t)
	b.signs(t, "one", "two")
	b.testify(t)
	b.signs(t, "three")
	b.testify(t)
	text, err := os.ReadFile(b.path)
	if err != nil {
		t.Fatal(err)
	}
	lines := bytes.SplitAfter(bytes.TrimSuffix(text, []byte("\n")), []byte("\n"))
	without := func(n ...int) []byte {
		var out []byte
	next:
		for i, l := range lines {
			for _, x := range n {
				if i == x {
					continue next
				}
			}
			out = append(out, l...)
		}
		return out
	}
	swapped := bytes.Join([][]byte{lines[0], lines[3], lines[4], lines[1], lines[2], lines[5], lines[6], lines[7], lines[8]}, nil)
	for name, c := range map[string]struct {
		text []byte
		rule journal.Rule
	}{
		"a signature left out":     {without(1, 2), journal.RuleOffTheBooks},
		"all of a period left out": {without(6, 7), journal.RuleOffTheBooks},
		"a testimony left out":     {without(5), journal.RuleTaken},
		"a period left out":        {without(1, 2, 3, 4, 5), journal.RuleTaken},
		"a question left out":      {without(1), journal.RuleForm},
		"two signatures swapped":   {swapped, journal.RuleOffTheBooks},
		"a testimony twice":        {bytes.Join([][]byte{text, lines[len(lines)-1], []byte("\n")}, nil), journal.RuleForm},
		"an older testimony again": {bytes.Join([][]byte{text, lines[5]}, nil), journal.RuleTaken},
		"a line that is none":      {append(bytes.Clone(text), "{}\n"...), journal.RuleForm},
		"something else":           {[]byte("hello\n"), journal.RuleForm},
		"another digest":           {bytes.Replace(text, []byte(`"message":"b25l"`), []byte(`"message":"b25k"`), 1), journal.RuleForm},
	} {
		if r, err := b.verifyText(t, c.text); !errors.Is(err, &journal.Contradiction{Rule: c.rule}) {
			t.Errorf("%s: %+v, %v; %s is expected", name, r, err, c.rule)
		}
	}
	if _, err := b.verifyText(t, text); err != nil {
		t.Errorf("as it was: %v", err)
	}
	// Another TPM's testimonies.
	other := newBench(t)
	other.signs(t, "one")
	other.testify(t)
	foreign, err := os.ReadFile(other.path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.verifyText(t, foreign); !errors.Is(err, &journal.Contradiction{Rule: journal.RuleAK}) {
		t.Errorf("another TPM's journal: %v", err)
	}
}

// TestLost: what the TPM does not testify to is told, and is no contradiction.
func TestLost(t *testing.T) {
	b := newBench(t)
	b.signs(t, "one")
	if err := b.sim.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := b.sim.Restart(); err != nil {
		t.Fatal(err)
	}
	b.testify(t)
	b.signs(t, "two")
	b.testify(t)
	r, err := b.verify(t)
	if err != nil || len(r.Lost) != 1 || r.Signatures != 1 {
		t.Errorf("after a reset: %+v, %v", r, err)
	}
	// The signer is killed after it asked, before the TPM did it, and after.
	digest := sha256.Sum256([]byte("x"))
	name, err := attest.KeyName(b.key.PublicArea())
	if err != nil {
		t.Fatal(err)
	}
	done, err := b.j.Begin(name, digest, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := done(nil, nil); err != nil {
		t.Fatal(err)
	}
	b.signs(t, "three")
	b.testify(t)
	if r, err = b.verify(t); err != nil || len(r.Lost) != 1 || r.Signatures != 2 {
		t.Errorf("what was asked for was not done: %+v, %v", r, err)
	}
	if done, err = b.j.Begin(name, digest, nil); err != nil {
		t.Fatal(err)
	}
	if err := done(nil, nil); err != nil {
		t.Fatal(err)
	}
	b.behind(t, "x")
	b.signs(t, "four")
	b.testify(t)
	if r, err = b.verify(t); err != nil || len(r.Lost) != 2 || r.Signatures != 2 {
		t.Errorf("what was asked for was done: %+v, %v", r, err)
	}
}

// TestUnfinishedLine: what a crash left of a line is cut off, and no more.
func TestUnfinishedLine(t *testing.T) {
	path := filepath.Join(t.TempDir(), "j")
	for text, want := range map[string]string{"": "", "a\n": "a\n", "a\nb": "a\n", "b": ""} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		j, err := journal.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := j.Close(); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(path); err != nil || string(got) != want {
			t.Errorf("%q became %q, %v", text, got, err)
		}
	}
	if err := os.WriteFile(path, bytes.Repeat([]byte("x"), 100<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := journal.Open(path); err == nil {
		t.Error("another kind of file was taken")
	}
}

// FuzzVerify: no journal crashes verification, and none that the TPM did not
// testify to counts a signature.
func FuzzVerify(f *testing.F) {
	f.Add([]byte(`{"asked":{"key":"00","digest":"AAAA"}}` + "\n" + `{"signed":"AAAA"}` + "\n"))
	f.Add([]byte(`{"testimony":{"time":"2026-01-01T00:00:00Z","ak":"AAAA","attest":"AAAA","signature":"AAAA"}}` + "\n"))
	f.Add([]byte(`{"refused":"x"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := journal.Verify(bytes.NewReader(b), journal.Options{Explain: func(journal.Signature) bool { return true }})
		if (r == nil) == (err == nil) {
			t.Fatal("neither a report nor an error, or both")
		}
		if r != nil && r.Signatures > 0 {
			t.Fatal("a signature that no TPM testified to")
		}
	})
}

// TestFullDisk: a line that the disk had no room for in whole is not left in
// part, where the next one would be a part of it too.
func TestFullDisk(t *testing.T) {
	b := newBench(t)
	b.testify(t)
	b.signs(t, "one") // the TPM will testify to it
	fi, err := os.Stat(b.path)
	if err != nil {
		t.Fatal(err)
	}
	signal.Ignore(unix.SIGXFSZ)
	defer signal.Reset(unix.SIGXFSZ)
	var before unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_FSIZE, &before); err != nil {
		t.Fatal(err)
	}
	full := before
	full.Cur = uint64(fi.Size()) + 20
	if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &full); err != nil {
		t.Fatal(err)
	}
	_, err = crypto.SignMessage(b.key, nil, []byte("two"), crypto.SHA256)
	_, testimony := b.dev.Testify([]byte("x")) // the TPM gives it once
	if again := unix.Setrlimit(unix.RLIMIT_FSIZE, &before); again != nil {
		t.Fatal(again)
	}
	if !errors.Is(err, unix.EFBIG) || !errors.Is(testimony, unix.EFBIG) {
		t.Fatalf("without room for it: %v, %v", err, testimony)
	}
	b.signs(t, "three")
	b.testify(t)
	if r, err := b.verify(t); err != nil || r.Signatures != 2 || len(r.Lost) != 0 {
		t.Errorf("%+v, %v", r, err)
	}
}

// TestKilledBesideOthers: what a process that was killed left of a line is cut
// off by the others that write to the file, not at their next start alone.
func TestKilledBesideOthers(t *testing.T) {
	b := newBench(t)
	b.signs(t, "one")
	for left, write := range map[string]func(){`{"asked":{"key":"00`: func() { b.signs(t, "two") }, string(make([]byte, 8<<10)): func() { b.testify(t) }} {
		f, err := os.OpenFile(b.path, os.O_WRONLY|os.O_APPEND, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteString(left); err != nil {
			t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		write()
	}
	b.testify(t)
	if r, err := b.verify(t); err != nil || r.Signatures != 2 || len(r.Lost) != 0 {
		t.Errorf("%+v, %v", r, err)
	}
}

// TestCopiedWhileWritten: a copy of a journal that somebody writes, or that a
// crash ended, may end in the middle of a line, and stands.
func TestCopiedWhileWritten(t *testing.T) {
	b := newBench(t)
	b.signs(t, "one")
	b.testify(t)
	text, err := os.ReadFile(b.path)
	if err != nil {
		t.Fatal(err)
	}
	for _, tail := range []string{`{"asked":{"key":"00`, string(make([]byte, 8<<10))} {
		if r, err := b.verifyText(t, append(bytes.Clone(text), tail...)); err != nil || r.Signatures != 1 {
			t.Errorf("with %.20q at its end: %+v, %v", tail, r, err)
		}
	}
	if _, err := b.verifyText(t, append(bytes.Clone(text), "{\n"...)); !errors.Is(err, &journal.Contradiction{Rule: journal.RuleForm}) {
		t.Errorf("a whole line that is none: %v", err)
	}
}
