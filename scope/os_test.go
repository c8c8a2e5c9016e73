package scope_test

import (
	"bytes"
	"encoding/json"
	"math/rand/v2"
	"strings"
	"testing"

	"inkan/scope"
)

const withoutOS = `{"version":1,"allowed_actions":["order.cancel"],"allowed_venues":["XPAR"],"os":`

func parseOS(t testing.TB, os string) *scope.Scope {
	t.Helper()
	s, err := scope.Parse([]byte(withoutOS + os + "}"))
	if err != nil {
		t.Fatalf("%s: %v", os, err)
	}
	return s
}

func TestBadOS(t *testing.T) {
	zeros := strings.Repeat("0", 64)
	for text, want := range map[string]string{
		`{}`:                                                                             "execute is empty",
		`{"execute":["/"]}`:                                                              "/ has everything below it",
		`{"execute":["usr"]}`:                                                            "an absolute path",
		`{"execute":["/usr/../root"]}`:                                                   "an absolute path",
		`{"execute":["/usr/"]}`:                                                          "an absolute path",
		`{"execute":["/usr","/usr"]}`:                                                    "stands twice",
		`{"execute":["/a b"]}`:                                                           "without spaces",
		`{"execute":["/usr"],"sockets":[]}`:                                              "unknown member",
		`{"execute":["/usr"],"read":["/proc"]}`:                                          "cannot be granted",
		`{"execute":["/usr"],"read":["/proc/1"]}`:                                        "cannot be granted",
		`{"execute":["/usr"],"read":["/proc/self/../1"]}`:                                "an absolute path",
		`{"execute":["/usr"],"read":["/dev"]}`:                                           "cannot be granted",
		`{"execute":["/usr"],"read":["/dev/tpmrm0"]}`:                                    "cannot be granted",
		`{"execute":["/usr"],"read":["/dev/tpm0"]}`:                                      "cannot be granted",
		`{"execute":["/usr"],"write":["/dev/mem"]}`:                                      "cannot be granted",
		`{"execute":["/usr"],"write":["/proc/self"]}`:                                    "can only be read",
		`{"execute":["/dev/null"]}`:                                                      "can only be read",
		`{"execute":["/usr"],"read":["/sys"]}`:                                           "cannot be granted",
		`{"execute":["/usr"],"write":["/usr/tmp"]}`:                                      "could run what it wrote",
		`{"execute":["/usr/bin"],"write":["/usr"]}`:                                      "could run what it wrote",
		`{"execute":["/usr"],"connect":[{"network":"10.0.0.1/8","ports":[1]}]}`:          "without host bits",
		`{"execute":["/usr"],"connect":[{"network":"10.0.0.0/8","ports":[]}]}`:           "1 to 64 ports",
		`{"execute":["/usr"],"connect":[{"network":"10.0.0.0/8","ports":[0]}]}`:          "port 0",
		`{"execute":["/usr"],"connect":[{"network":"10.0.0.0/8","ports":[1,1]}]}`:        "stands twice",
		`{"execute":["/usr"],"connect":[{"network":"::ffff:10.0.0.0/104","ports":[1]}]}`: "network",
		`{"execute":["/usr"],"connect":[{"network":"example.org","ports":[1]}]}`:         "network",
		`{"execute":["/usr"],"connect":[{"ports":[1]}]}`:                                 "network",
		`{"execute":["/usr"],"env":["LD_PRELOAD"]}`:                                      "changes how programs are loaded",
		`{"execute":["/usr"],"env":["GLIBC_TUNABLES"]}`:                                  "changes how programs are loaded",
		`{"execute":["/usr"],"env":["INKAN_FD"]}`:                                        "changes how programs are loaded",
		`{"execute":["/usr"],"env":["A=B"]}`:                                             "a name such as LANG",
		`{"execute":["/usr"],"limits":{"open_files":3}}`:                                 "at least 8",
		`{"execute":["/usr"],"limits":{"open_files":-1}}`:                                "open_files",
		`{"execute":["/usr"],"start":[{"executable_sha256":"00"}]}`:                      "64 lower-case hex digits",
		`{"execute":["/usr"],"start":[{"executable_sha256":"` + zeros + `","files":[{"path":"x","sha256":"` + zeros + `"}]}]}`: "an absolute path",
		`{"execute":["/usr"],"start":[{"executable_sha256":"` + zeros + `"},{"executable_sha256":"` + zeros + `"}]}`:           "stands twice",
	} {
		_, err := scope.Parse([]byte(withoutOS + text + "}"))
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want something about %q", text, err, want)
		}
	}
}

func TestOSOneSpelling(t *testing.T) {
	a := parseOS(t, `{"write":["/b","/a"],"execute":["/usr"],"limits":{},"connect":[{"network":"10.0.0.0/8","ports":[443,80]}],"env":["TZ","LANG"]}`)
	b := parseOS(t, `{"connect":[{"network":"10.0.0.0/8","ports":[80,443]}],"env":["LANG","TZ"],"execute":["/usr"],"write":["/a","/b"]}`)
	if !bytes.Equal(a.Canonical(), b.Canonical()) || a.OS().Digest() != b.OS().Digest() {
		t.Errorf("two spellings of one section:\n%s\n%s", a.Canonical(), b.Canonical())
	}
	text, err := a.OS().Canonical()
	if err != nil {
		t.Fatal(err)
	}
	again, err := scope.ParseOS(text)
	if err != nil || again.Digest() != a.OS().Digest() {
		t.Errorf("the section does not read back: %v", err)
	}
	if _, err := scope.ParseOS(append([]byte(" "), text...)); err == nil {
		t.Error("another spelling was accepted")
	}
}

// TestOSContains: one row a member, each of them wider in one thing alone.
func TestOSContains(t *testing.T) {
	x, y := strings.Repeat("0", 64), strings.Repeat("1", 64)
	outer := `{"execute":["/usr/bin"],"read":["/etc/ssl"],"write":["/srv/a"],"connect":[{"network":"10.0.0.0/8","ports":[80,443]}],"env":["LANG"],"limits":{"open_files":64,"cpu_seconds":10},"start":[{"executable_sha256":"` + x + `"}]}`
	inner := strings.NewReplacer("/usr/bin", "/usr/bin/python3", "/etc/ssl", "/etc/ssl/certs", "/srv/a", "/srv/a/b", "10.0.0.0/8", "10.1.0.0/16", "80,443", "443", `"LANG"`, ``, `64`, `32`, `10}`, `9}`).Replace(outer)
	if err := scope.Contains(parseOS(t, outer), parseOS(t, inner)); err != nil {
		t.Fatalf("narrower in all: %v", err)
	}
	plain, err := scope.Parse([]byte(strings.TrimSuffix(withoutOS, `,"os":`) + "}"))
	if err != nil {
		t.Fatal(err)
	}
	if err := scope.Contains(plain, parseOS(t, outer)); err != nil {
		t.Errorf("an os section narrows a scope without one: %v", err)
	}
	if scope.Contains(parseOS(t, outer), plain) == nil {
		t.Error("no os section was taken for a narrower one")
	}
	for name, change := range map[string][2]string{
		"execute": {`"/usr/bin"`, `"/usr/bin2"`}, "parent": {`"/usr/bin"`, `"/usr"`}, "read": {`"/etc/ssl"`, `"/etc/ssh"`}, "write": {`"/srv/a"`, `"/srv/b"`},
		"network": {`10.0.0.0/8`, `0.0.0.0/0`}, "other network": {`10.0.0.0/8`, `11.0.0.0/16`}, "port": {`80,443`, `80,8080`}, "env": {`"LANG"`, `"TZ"`},
		"limit": {`64`, `65`}, "no limit": {`,"cpu_seconds":10`, ``}, "start": {x, y}, "no start": {`,"start":[{"executable_sha256":"` + x + `"}]`, ``},
	} {
		changed := strings.Replace(outer, change[0], change[1], 1)
		if changed == outer {
			t.Fatalf("%s changes nothing", name)
		}
		if scope.Contains(parseOS(t, outer), parseOS(t, changed)) == nil {
			t.Errorf("%s: %s was taken for narrower than %s", name, changed, outer)
		}
	}
	// What may be written may be read; with files named, other files are wider.
	if err := scope.Contains(parseOS(t, `{"execute":["/usr"],"write":["/a"]}`), parseOS(t, `{"execute":["/usr"],"read":["/a/b"]}`)); err != nil {
		t.Error(err)
	}
	named := func(sum string) string {
		return `{"execute":["/usr"],"start":[{"executable_sha256":"` + x + `","files":[{"path":"/b","sha256":"` + sum + `"}]}]}`
	}
	if err := scope.Contains(parseOS(t, named(x)), parseOS(t, named(x))); err != nil {
		t.Error(err)
	}
	for _, wide := range []string{named(y), `{"execute":["/usr"],"start":[{"executable_sha256":"` + x + `"}]}`} {
		if scope.Contains(parseOS(t, named(x)), parseOS(t, wide)) == nil {
			t.Errorf("%s was taken for narrower", wide)
		}
	}
}

func randomOS(r *rand.Rand) string {
	pick := func(all ...string) []string {
		out := []string{}
		for _, x := range all {
			if r.IntN(2) == 0 {
				out = append(out, x)
			}
		}
		return out
	}
	b, _ := json.Marshal(map[string]any{"execute": append(pick("/x/bin"), "/usr/bin"), "read": pick("/r", "/r/a", "/w/a"), "write": pick("/w", "/w/a"), "env": pick("A", "B"),
		"connect": []any{map[string]any{"network": []string{"10.0.0.0/8", "10.1.0.0/16", "0.0.0.0/0"}[r.IntN(3)], "ports": []int{1 + r.IntN(2)}}},
		"limits":  map[string]any{"open_files": []int{0, 16, 32}[r.IntN(3)]}})
	return string(b)
}

// TestOSContainsIsAnOrder: what contains what contains a third contains the third.
func TestOSContainsIsAnOrder(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	chains := 0
	for range 100000 {
		a, b := parseOS(t, randomOS(r)), parseOS(t, randomOS(r))
		if scope.Contains(a, b) != nil {
			continue
		}
		c := parseOS(t, randomOS(r))
		if scope.Contains(b, c) != nil {
			continue
		}
		chains++
		if err := scope.Contains(a, c); err != nil {
			t.Fatalf("%v\n%s\n%s\n%s", err, a.Canonical(), b.Canonical(), c.Canonical())
		}
	}
	if chains < 40 {
		t.Fatalf("only %d chains: the test shows nothing", chains)
	}
}

func TestDescribeOS(t *testing.T) {
	s := parseOS(t, `{"execute":["/usr"],"read":["/etc/ssl"],"write":["/srv/a"],"connect":[{"network":"10.0.0.0/8","ports":[80,443]}],"env":["LANG"],"limits":{"open_files":64},"start":[{"executable_sha256":"`+strings.Repeat("0", 64)+`"}]}`)
	text := strings.Join(s.Describe(), "\n")
	for _, want := range []string{"read: /etc/ssl.", "read and write: /srv/a.", "run programs of: /usr.", "10.0.0.0/8, TCP port 80, 443.", "LANG", "open_files 64", "SHA-256 0000"} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is missing in\n%s", want, text)
		}
	}
}

func FuzzParseOS(f *testing.F) {
	r := rand.New(rand.NewPCG(7, 8))
	for range 8 {
		text, err := parseOS(f, randomOS(r)).OS().Canonical()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		o, err := scope.ParseOS(b)
		if err != nil {
			return
		}
		again, err := o.Canonical()
		if err != nil || !bytes.Equal(again, b) {
			t.Fatalf("another spelling was accepted: %s", b)
		}
		s := parseOS(t, string(b))
		if err := scope.Contains(s, s); err != nil {
			t.Fatalf("a section is wider than itself: %v", err)
		}
	})
}

func TestStartDocument(t *testing.T) {
	d := scope.StartDocument{Version: 1, Agent: "spiffe://e/agent/a", Executable: scope.StartFile{Path: "/usr/bin/python3", SHA256: strings.Repeat("0", 64)}, Files: []scope.StartFile{{Path: "/b", SHA256: strings.Repeat("1", 64)}}, Args: []string{"python3", "/b"}, Launcher: strings.Repeat("2", 64)}
	b, err := d.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	again, err := scope.ParseStartDocument(b)
	if err != nil {
		t.Fatal(err)
	}
	x, err := d.Run()
	if err != nil {
		t.Fatal(err)
	}
	y, err := again.Run()
	if err != nil || *x != *y {
		t.Errorf("it reads back as another start: %v", err)
	}
	for _, bad := range []string{"", "{}", " " + string(b), strings.Replace(string(b), `"ver":1`, `"ver":2`, 1), strings.Replace(string(b), `"uid":0`, `"uid":0,"who":1`, 1)} {
		if _, err := scope.ParseStartDocument([]byte(bad)); err == nil {
			t.Errorf("accepted: %.60s", bad)
		}
	}
	d.Args = []string{strings.Repeat("x", scope.MaxStartDocument)}
	if _, err := d.Run(); err == nil {
		t.Error("a document of any size was accepted")
	}
}

func FuzzParseStartDocument(f *testing.F) {
	f.Add([]byte(`{"args":["x"],"executable":{"path":"/x","sha256":"00"},"files":[],"landlock_abi":7,"launcher_sha256":"00","os":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA","sub":"a","uid":0,"ver":1}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		d, err := scope.ParseStartDocument(b)
		if err != nil {
			return
		}
		if again, err := d.Marshal(); err != nil || !bytes.Equal(again, b) {
			t.Fatalf("another spelling was accepted: %s", b)
		}
	})
}
