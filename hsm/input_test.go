package hsm

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestParseURI(t *testing.T) {
	for _, c := range []struct{ in, err string }{
		{"pkcs11:token=My%20token;id=%01%ff?module-path=/usr/lib/x.so&pin-source=file:/run/pin", ""},
		{"pkcs11:", ""},
		{"file:/x", "begins with pkcs11:"},
		{"pkcs11:token=a;token=b", "stands twice"},
		{"pkcs11:token", "without a value"},
		{"pkcs11:token=", "is empty"},
		{"pkcs11:token=%zz", "percent-encoded"},
		{"pkcs11:tokem=a", "unknown attribute"},
		{"pkcs11:token=a?", "nothing follows"},
		{"pkcs11:token=a?pin-value=1234", "pin-value shows the PIN"},
		{"pkcs11:token=a?module-path=x.so", "absolute"},
		{"pkcs11:token=a?slot=1", "unknown query"},
		{"pkcs11:type=public", "type must be"},
		{"pkcs11:id=" + strings.Repeat("%00", 256), "id has 256 bytes"},
		{"pkcs11:token=" + strings.Repeat("a", 2100), "bytes, at most"},
	} {
		u, err := ParseURI(c.in)
		if c.err == "" {
			if err != nil {
				t.Errorf("%.60s: %v", c.in, err)
			} else if v, err := ParseURI(u.String()); err != nil || v.String() != u.String() {
				t.Errorf("%.60s: came back as %v, %v", c.in, v, err)
			}
			continue
		}
		if err == nil || !strings.Contains(err.Error(), c.err) {
			t.Errorf("%.60s: got %v, want an error with %q", c.in, err, c.err)
		}
		if err != nil && strings.Contains(err.Error(), "1234") {
			t.Errorf("%.60s: the error shows the PIN", c.in)
		}
	}
}

func FuzzParseURI(f *testing.F) {
	f.Add("pkcs11:token=My%20token;id=%01%ff?module-path=/usr/lib/x.so&pin-source=file:/run/pin")
	f.Add("pkcs11:object=a;serial=1")
	f.Fuzz(func(t *testing.T, s string) {
		u, err := ParseURI(s)
		if err != nil {
			return
		}
		if len(u.String()) > maxURI {
			return // an escaped form may be longer than what was read
		}
		v, err := ParseURI(u.String())
		if err != nil || v.String() != u.String() {
			t.Errorf("%q came back as %v, %v", s, v, err)
		}
	})
}

// FuzzReadFrame: what is read and written again is the same.
func FuzzReadFrame(f *testing.F) {
	for _, q := range []request{{ID: 1, Op: opFind, Key: []byte{1}}, {ID: 2, Op: opSign, Scheme: schemeECDSA, Key: []byte("key"), Input: make([]byte, 32)}, {ID: 3, Op: opSign, Scheme: schemePSS, Hash: "SHA-512", Key: []byte("k")}} {
		var b bytes.Buffer
		if err := writeFrame(&b, &q); err != nil {
			f.Fatal(err)
		}
		f.Add(b.Bytes())
	}
	var b bytes.Buffer
	if err := writeFrame(&b, &response{ID: 7, Signature: []byte{1}}); err != nil {
		f.Fatal(err)
	}
	f.Add(b.Bytes())
	f.Add([]byte{0xff, 0xff, 0xff, 0xff})
	f.Add([]byte{0, 0, 0, 12, 'S', 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 64})
	f.Fuzz(func(t *testing.T, b []byte) {
		var q, q2 request
		if err := readFrame(bytes.NewReader(b), &q); err == nil {
			var again bytes.Buffer
			if err := writeFrame(&again, &q); err == nil {
				if err := readFrame(&again, &q2); err != nil || !reflect.DeepEqual(normal(q), normal(q2)) {
					t.Errorf("%+v came back as %+v, %v", q, q2, err)
				}
			}
		}
		var a response
		_ = readFrame(bytes.NewReader(b), &a)
	})
}

// normal makes empty and absent fields alike: a frame does not tell them apart.
func normal(q request) request {
	for _, b := range []*[]byte{&q.Key, &q.Input} {
		if len(*b) == 0 {
			*b = nil
		}
	}
	return q
}

func TestBadFrames(t *testing.T) {
	for name, body := range map[string]string{
		"short": "S1234567", "unknown scheme": "S12345678\x09\x00\x00", "unknown hash": "S12345678\x00\x09\x00",
		"long CKA_ID": "S12345678\x00\x00\x41", "cut CKA_ID": "S12345678\x00\x00\x02x", "unknown kind": "T", "empty": "",
	} {
		if err := new(request).decode([]byte(body)); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	for _, body := range []string{"s12345678", "s", "S12345678x", ""} {
		if err := new(response).decode([]byte(body)); err == nil {
			t.Errorf("response %q: accepted", body)
		}
	}
}

func TestReadPIN(t *testing.T) {
	dir := t.TempDir()
	file := func(name, text string, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	good := file("good", "s3cret\n", 0o600)
	t.Setenv("CREDENTIALS_DIRECTORY", dir)
	for _, c := range []struct{ source, err string }{
		{"file:" + good, ""},
		{"credential:good", ""},
		{"credential:../good", "no slash"},
		{"file:" + file("open", "s3cret\n", 0o644), "others may read it"},
		{"file:" + file("empty", "\n", 0o600), "one line"},
		{"file:" + file("two", "s3cret\nx\n", 0o600), "one line"},
		{"file:" + file("long", strings.Repeat("s", 257), 0o600), "one line"},
		{"file:" + dir, "not a regular file"},
		{"file:/nonexistent", "no such file"},
		{"fd:0", "3 to 1023"},
		{"s3cret", "expected"},
		{"env:PIN", "are known"},
		{"sealed:" + good, ""},
		{"sealed:/nonexistent", "no such file"},
		{"sealed:" + file("foreign", "x", 0o600), "of another TPM"},
	} {
		p, err := ReadPIN(c.source, func(b []byte) ([]byte, error) { // package tpm opens it: TestSeal
			if string(b) == "x" {
				return nil, errors.New("of another TPM")
			}
			return b, nil
		})
		if c.err == "" {
			if err != nil || p.value != "s3cret" {
				t.Errorf("%s: %v", c.source, err)
			}
			if s := fmt.Sprintf("%v %+v %#v %s", p, p, p, p); strings.Contains(s, "s3cret") {
				t.Errorf("a PIN prints as %s", s)
			}
			continue
		}
		if err == nil || !strings.Contains(err.Error(), c.err) {
			t.Errorf("%s: got %v, want an error with %q", c.source, err, c.err)
		}
		if err != nil && strings.Contains(err.Error(), "s3cret") {
			t.Errorf("%s: the error shows the PIN", c.source)
		}
	}
}

func TestAttributes(t *testing.T) {
	yes, no := true, false
	good := Attributes{Sensitive: &yes, Extractable: &no, AlwaysSensitive: &yes, NeverExtractable: &yes}
	if err := good.Check(); err != nil {
		t.Error(err)
	}
	for name, spoil := range map[string]func(*Attributes){
		"CKA_SENSITIVE":         func(a *Attributes) { a.Sensitive = &no },
		"CKA_EXTRACTABLE":       func(a *Attributes) { a.Extractable = &yes },
		"CKA_ALWAYS_SENSITIVE":  func(a *Attributes) { a.AlwaysSensitive = nil },
		"CKA_NEVER_EXTRACTABLE": func(a *Attributes) { a.NeverExtractable = &no },
	} {
		a := good
		spoil(&a)
		refused, ok := errors.AsType[*AttributeError](a.Check())
		if !ok || refused.Attribute != name {
			t.Errorf("%s: %v", name, a.Check())
		}
	}
}

// TestPINFromAPipe: a PIN file that is a pipe is refused, and nobody waits for a writer.
func TestPINFromAPipe(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pin")
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() {
		_, err := ReadPIN("file:"+path, nil)
		done <- err
	}()
	select {
	case err := <-done:
		if err == nil || !strings.Contains(err.Error(), "not a regular file") {
			t.Error(err)
		}
	case <-time.After(5 * time.Second):
		t.Error("it waits for a writer")
	}
}
