package audit_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"inkan/audit"
)

// TestReadOnly: a record on a medium that is read-only is read, and nothing is
// written beside it. While somebody writes it, what is not in the file yet is not left out.
func TestReadOnly(t *testing.T) {
	d := newDesk(t)
	d.record(t, 1)
	if err := d.log.Close(); err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(d.path)
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	program, err := os.ReadFile(self)
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "medium") // others may read it
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = errors.Join(os.Chmod(dir, 0o700), os.RemoveAll(dir)) }() // of a test
	path, reader := filepath.Join(dir, "log.db"), filepath.Join(dir, "reader")
	if err := errors.Join(os.WriteFile(path, content, 0o644), os.WriteFile(reader, program, 0o755), os.Chmod(dir, 0o555)); err != nil {
		t.Fatal(err)
	}
	read := func() (string, error) {
		cmd := exec.Command(reader)
		cmd.Env, cmd.Dir = append(os.Environ(), readerEnv+"="+path), "/"
		if os.Geteuid() == 0 {
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		}
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	if out, err := read(); err != nil || out != "1 <nil>\n" {
		t.Errorf("%q, %v", out, err)
	}
	if list, err := os.ReadDir(dir); err != nil || len(list) != 2 {
		t.Errorf("there is %v beside it now, %v", list, err)
	}
	if err := errors.Join(os.Chmod(dir, 0o755), os.WriteFile(path+"-wal", []byte("something"), 0o644), os.Chmod(dir, 0o555)); err != nil {
		t.Fatal(err)
	}
	if out, err := read(); err == nil {
		t.Errorf("with a write-ahead log: %q", out)
	}
}

// TestNameOfAFile: what has a meaning in a URI has none in the name of a file.
func TestNameOfAFile(t *testing.T) {
	d := newDesk(t)
	d.record(t, 1)
	if err := d.log.Close(); err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(d.path)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"a%41.db", "a?mode=rwc", "a#b"} {
		dir := filepath.Join(t.TempDir(), name)
		path := filepath.Join(dir, name)
		if err := errors.Join(os.Mkdir(dir, 0o700), os.WriteFile(path, content, 0o600)); err != nil {
			t.Fatal(err)
		}
		s, err := audit.OpenSnapshot(t.Context(), path)
		if err != nil {
			t.Error(err)
			continue
		}
		if s.Head.Size != 1 {
			t.Errorf("%s: %d entries", name, s.Head.Size)
		}
		s.Close()
		l, err := audit.Open(t.Context(), path, audit.Options{})
		if err != nil || l.Head().Size != 1 || l.Close() != nil {
			t.Errorf("%s: %v", name, err)
		}
		list, err := os.ReadDir(dir)
		for _, f := range list {
			if !strings.HasPrefix(f.Name(), name) {
				t.Errorf("there is %s", f.Name())
			}
		}
		if err != nil {
			t.Error(err)
		}
	}
}
