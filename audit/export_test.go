package audit_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"filippo.io/torchwood"
	"github.com/santhosh-tekuri/jsonschema/v6"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"inkan/audit"
	"inkan/internal/jws"
	"inkan/internal/testca"
	"inkan/scope"
)

// seal has the agent's key sign the head.
func (d *desk) seal(t testing.TB) string {
	t.Helper()
	return d.sealWith(t, d.agent.Key)
}

func (d *desk) sealWith(t testing.TB, key crypto.Signer) string {
	t.Helper()
	s, err := d.log.Seal(t.Context(), d.id)
	if err != nil {
		t.Fatal(err)
	}
	text, err := s.Spend()
	if err != nil {
		t.Fatal(err)
	}
	sig, err := jws.Sign(key, text)
	if err != nil {
		t.Fatal(err)
	}
	n, err := d.log.KeepSeal(t.Context(), s, key.Public(), sig)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func (d *desk) export(t testing.TB, o audit.ExportOptions) []byte {
	t.Helper()
	s, err := audit.OpenSnapshot(t.Context(), d.path)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	var b bytes.Buffer
	if _, err := s.Export(t.Context(), &b, o); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func (d *desk) verifyExport(export []byte) ([]*audit.Report, error) {
	return audit.VerifyExport(context.Background(), bytes.NewReader(export), audit.VerifyOptions{Roots: d.ca.Roots})
}

func claim(t testing.TB, r *audit.Report, name string) audit.Claim {
	t.Helper()
	i := slices.IndexFunc(r.Claims, func(c audit.Claim) bool { return c.Name == name })
	if i < 0 {
		t.Fatalf("there is no claim %s in %+v", name, r.Claims)
	}
	return r.Claims[i]
}

// filled is a desk with signed orders, one a minute, a refusal after each third, and a head.
func filled(t testing.TB, n uint64) *desk {
	t.Helper()
	d := newDesk(t)
	for i := range n {
		d.sign(t, d.record(t, i))
		if i%3 == 2 {
			if err := d.log.Refuse(t.Context(), action(1000+i, "501"), &scope.Refusal{Rule: scope.RuleOrderNotional, Message: "too much"}, d.id); err != nil {
				t.Fatal(err)
			}
		}
	}
	d.seal(t)
	return d
}

func TestExport(t *testing.T) {
	d := filled(t, 20)
	export := d.export(t, audit.ExportOptions{})
	reports, err := d.verifyExport(export)
	if err != nil {
		t.Fatal(err)
	}
	r := reports[0]
	if len(reports) != 1 || r.Entries != 26 || r.Signed != 20 || r.Denials != 6 || r.Agent != d.agent.ID || r.Head == nil || r.Head.Size != 26 {
		t.Errorf("report = %+v", r)
	}
	for _, name := range []string{"authentic", "in_scope", "limits_over_time", "in_order", "complete"} {
		if !claim(t, r, name).Proven {
			t.Errorf("%s is not proven", name)
		}
	}
	// It says what the file itself says.
	whole, err := d.verify(t)
	if err != nil {
		t.Fatal(err)
	}
	if whole.Root != r.Root || whole.Entries != r.Entries || *whole.Head != *r.Head || whole.After != 0 || !claim(t, whole, "complete").Proven {
		t.Errorf("file %+v, export %+v", whole, r)
	}
	// Two exports joined are two reports.
	if reports, err = d.verifyExport(append(slices.Clone(export), export...)); err != nil || len(reports) != 2 {
		t.Errorf("joined: %d reports, %v", len(reports), err)
	}
	// What follows the head is not in the export, and the file's report says so.
	d.sign(t, d.record(t, 500))
	if again := d.export(t, audit.ExportOptions{}); !bytes.Equal(again, export) {
		t.Error("an entry after the head changed the export")
	}
	if whole, err = d.verify(t); err != nil || whole.After != 1 {
		t.Errorf("file %+v, %v", whole, err)
	}
}

func TestExportOfNothing(t *testing.T) {
	d := newDesk(t)
	s, err := audit.OpenSnapshot(t.Context(), d.path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Export(t.Context(), io.Discard, audit.ExportOptions{}); !errors.Is(err, audit.ErrNoHead) {
		t.Errorf("without a head: %v", err)
	}
	s.Close()
	d.seal(t)
	reports, err := d.verifyExport(d.export(t, audit.ExportOptions{}))
	if err != nil || reports[0].Entries != 0 || !claim(t, reports[0], "complete").Proven {
		t.Errorf("nothing was done: %+v, %v", reports, err)
	}
	if r, err := d.verify(t); err != nil || r.Head == nil {
		t.Errorf("the file: %+v, %v", r, err)
	}
}

// TestExportSchema: every line is as the published schema says.
func TestExportSchema(t *testing.T) {
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(audit.ExportSchema))
	if err != nil {
		t.Fatal(err)
	}
	c := jsonschema.NewCompiler()
	if err := c.AddResource("export.json", doc); err != nil {
		t.Fatal(err)
	}
	s, err := c.Compile("export.json")
	if err != nil {
		t.Fatal(err)
	}
	d := filled(t, 4)
	empty := newDesk(t)
	empty.seal(t)
	from := scope.Timestamp{Time: time.Now().Add(-time.Hour)}
	for line := range bytes.Lines(slices.Concat(d.export(t, audit.ExportOptions{}), d.export(t, audit.ExportOptions{Filter: audit.Filter{From: &from, Instrument: "isin:FR0000120271"}}), empty.export(t, audit.ExportOptions{}))) {
		v, err := jsonschema.UnmarshalJSON(bytes.NewReader(line))
		if err == nil {
			err = s.Validate(v)
		}
		if err != nil {
			t.Errorf("%.100s: %v", line, err)
		}
	}
}

// TestExportClock: an export says what was known of the clock.
func TestExportClock(t *testing.T) {
	d := newDesk(t)
	now := time.Now()
	p, err := scope.Check(d.scope, action(1, "100"), scope.Env{Now: now, AttestedAt: now, Clock: &scope.Clock{Source: scope.ClockChrony, Divergence: 42}})
	if err != nil {
		t.Fatal(err)
	}
	r, err := d.log.Record(t.Context(), p, d.id)
	if err != nil {
		t.Fatal(err)
	}
	d.sign(t, r)
	d.seal(t)
	export := d.export(t, audit.ExportOptions{})
	if !bytes.Contains(export, []byte(`"clock_source":"chrony"`)) || !bytes.Contains(export, []byte(`"clock_divergence_us":"42"`)) {
		t.Errorf("the clock is missing:\n%s", export)
	}
	if _, err := d.verifyExport(export); err != nil {
		t.Error(err)
	}
	var unproven *audit.Unproven
	if _, err := d.verifyExport(bytes.Replace(export, []byte(`"clock_divergence_us":"42"`), []byte(`"clock_divergence_us":"1"`), 1)); !errors.As(err, &unproven) {
		t.Errorf("another divergence than the statement's verifies: %v", err)
	}
}

// TestExportStart: an export has the start documents that its entries name.
func TestExportStart(t *testing.T) {
	d, doc := confined(t, nil)
	if err := d.log.AddStart(t.Context(), doc); err != nil {
		t.Fatal(err)
	}
	d.recordConfined(t)
	d.seal(t)
	export := d.export(t, audit.ExportOptions{})
	reports, err := d.verifyExport(export)
	if err != nil || !claim(t, reports[0], "what_ran").Proven {
		t.Fatalf("%+v, %v", reports, err)
	}
	for name, change := range map[string][2]string{"absent": {`{"kind":"start"`, `{"kind":"head","version":1}` + "\n" + `{"kind":"start"`}, "changed": {`/usr/bin/x`, `/usr/bin/y`}} {
		_, err := d.verifyExport(bytes.Replace(export, []byte(change[0]), []byte(change[1]), 1))
		if u, ok := errors.AsType[*audit.Unproven](err); !ok || u.Rule != audit.RuleStart && name == "changed" {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// ecdsaVerifier verifies notes with the ECDSA type of c2sp.org/signed-note,
// written from that document and not from package audit.
type ecdsaVerifier struct {
	name string
	id   uint32
	key  *ecdsa.PublicKey
}

func (v *ecdsaVerifier) Name() string    { return v.name }
func (v *ecdsaVerifier) KeyHash() uint32 { return v.id }
func (v *ecdsaVerifier) Verify(msg, sig []byte) bool {
	sum := sha256.Sum256(msg)
	return ecdsa.VerifyASN1(v.key, sum[:], sig)
}

// judge makes it from a verifier key, as someone who has only that text does.
func judge(t testing.TB, vkey string) note.Verifier {
	t.Helper()
	parts := strings.Split(vkey, "+")
	raw, err := base64.StdEncoding.DecodeString(strings.Join(parts[2:], "+"))
	if err != nil || raw[0] != 2 {
		t.Fatalf("%q is not a key of type 2: %v", vkey, err)
	}
	key, err := x509.ParsePKIXPublicKey(raw[1:])
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(raw[1:])
	if want := fmt.Sprintf("%x", sum[:4]); parts[1] != want {
		t.Fatalf("key id %s, want %s", parts[1], want)
	}
	return &ecdsaVerifier{parts[0], binary.BigEndian.Uint32(sum[:4]), key.(*ecdsa.PublicKey)}
}

// TestProofsForOthers: torchwood, which knows nothing of this project, accepts
// every proof of an export.
func TestProofsForOthers(t *testing.T) {
	d := filled(t, 20)
	vkey, err := audit.VerifierKey(d.agent.ID, d.agent.Key.Public())
	if err != nil {
		t.Fatal(err)
	}
	policy := torchwood.ThresholdPolicy(2, torchwood.OriginPolicy("inkan-record/v1/example.org/agent/a"), torchwood.SingleVerifierPolicy(judge(t, vkey)))
	n := 0
	for _, l := range lines(t, d.export(t, audit.ExportOptions{})) {
		if l["kind"] != "entry" {
			continue
		}
		n++
		statement := []byte(l["statement"].(string))
		if err := torchwood.VerifyProof(policy, tlog.RecordHash(statement), []byte(l["proof"].(string))); err != nil {
			t.Errorf("line %d: %v", n, err)
		}
		if err := torchwood.VerifyProof(policy, tlog.RecordHash(append(statement, ' ')), []byte(l["proof"].(string))); err == nil {
			t.Errorf("line %d: a changed statement was accepted", n)
		}
	}
	if n != 26 {
		t.Errorf("%d lines", n)
	}
}

func lines(t testing.TB, export []byte) []map[string]any {
	t.Helper()
	var out []map[string]any
	for line := range bytes.Lines(export) {
		var m map[string]any
		if err := json.Unmarshal(line, &m); err != nil {
			t.Fatal(err)
		}
		out = append(out, m)
	}
	return out
}

// TestExportAttacks changes an export in one way each; verification must give
// the reason's name.
func TestExportAttacks(t *testing.T) {
	d := filled(t, 9) // 12 entries; lines: head, certificate, entries, end
	export := d.export(t, audit.ExportOptions{})
	other := newDesk(t)
	other.ca = d.ca
	other.agent = d.ca.Agent(t, "b", []byte(scopeJSON), nil)
	other.id.Agent, other.id.Certificate = other.agent.ID, sha256.Sum256(other.agent.Chain[0].Raw)
	if err := other.log.AddCertificate(t.Context(), other.agent.Chain); err != nil {
		t.Fatal(err)
	}
	for n := range uint64(12) {
		other.sign(t, other.record(t, 5000+n))
	}
	other.seal(t)
	foreign := bytes.SplitAfter(other.export(t, audit.ExportOptions{}), []byte("\n"))
	mine := bytes.SplitAfter(export, []byte("\n"))
	head := lines(t, export)[0]["checkpoint"].(string)

	// A stranger has a CA of their own, and so a certificate of the agent's name.
	stranger := testca.New(t)
	forged := newDesk(t)
	forged.agent = stranger.Agent(t, "a", []byte(scopeJSON), nil)
	forged.id.Certificate = sha256.Sum256(forged.agent.Chain[0].Raw)
	if err := forged.log.AddCertificate(t.Context(), forged.agent.Chain); err != nil {
		t.Fatal(err)
	}
	forged.sign(t, forged.record(t, 1))
	forged.seal(t)

	swap := func(old, new string) func([][]byte) []byte {
		return func(l [][]byte) []byte { return bytes.ReplaceAll(bytes.Join(l, nil), quoted(old), quoted(new)) }
	}
	edit := func(i int, old, new string) func([][]byte) []byte {
		return func(l [][]byte) []byte {
			changed := bytes.ReplaceAll(l[i], []byte(old), []byte(new))
			if bytes.Equal(changed, l[i]) {
				panic("nothing was changed: " + old)
			}
			l[i] = changed
			return bytes.Join(l, nil)
		}
	}
	text, sig, _ := strings.Cut(head, "\n\n")
	lastByte := func(s string) string { // another signature in the same form
		raw, _ := base64.StdEncoding.DecodeString(strings.TrimSuffix(s[strings.LastIndex(s, " ")+1:], "\n"))
		raw[len(raw)-1] ^= 1
		return s[:strings.LastIndex(s, " ")+1] + base64.StdEncoding.EncodeToString(raw) + "\n"
	}
	for name, c := range map[string]struct {
		change func(l [][]byte) []byte
		want   audit.Rule
	}{
		"a line is removed":          {func(l [][]byte) []byte { return bytes.Join(slices.Delete(l, 5, 6), nil) }, audit.RuleMissing},
		"the first entry is removed": {func(l [][]byte) []byte { return bytes.Join(slices.Delete(l, 2, 3), nil) }, audit.RuleMissing},
		"the last entry is removed":  {func(l [][]byte) []byte { return bytes.Join(slices.Delete(l, 13, 14), nil) }, audit.RuleTruncated},
		"the last entry and the end fit": {func(l [][]byte) []byte {
			l[14] = []byte(`{"kind":"end","entries":11}` + "\n")
			return bytes.Join(slices.Delete(l, 13, 14), nil)
		}, audit.RuleTruncated},
		"two lines are reordered":        {func(l [][]byte) []byte { l[4], l[7] = l[7], l[4]; return bytes.Join(l, nil) }, audit.RuleOrder},
		"a line stands twice":            {func(l [][]byte) []byte { return bytes.Join(slices.Insert(l, 5, l[4]), nil) }, audit.RuleOrder},
		"a statement is altered":         {edit(3, `\"OrderQty\":\"100\"`, `\"OrderQty\":\"101\"`), audit.RuleScope}, // its notional is not the order's
		"an identifier is altered":       {edit(3, `\"ClOrdID\":\"1\"`, `\"ClOrdID\":\"2\"`), audit.RuleSignature},
		"a refusal is altered":           {edit(5, `too much`, `too many`), audit.RuleProof},
		"a field is altered":             {edit(3, `"OrderQty":"100"`, `"OrderQty":"10"`), audit.RuleFields},
		"a field is left out":            {edit(3, `"Side":"1",`, ``), audit.RuleFields},
		"a field is added":               {edit(3, `"Side":"1",`, `"Side":"1","Trader":"me",`), audit.RuleForm},
		"a signature is left out":        {func(l [][]byte) []byte { return cutMember(l, 3, "jws") }, audit.RuleFields},
		"a proof is another's":           {func(l [][]byte) []byte { return swapMember(t, l, 3, 4, "proof") }, audit.RuleProof},
		"a signature is another's":       {func(l [][]byte) []byte { return swapMember(t, l, 3, 4, "jws") }, audit.RuleSignature},
		"a line is not JSON":             {func(l [][]byte) []byte { l[6] = []byte(`{"kind":"entry",` + "\n"); return bytes.Join(l, nil) }, audit.RuleForm},
		"a line is empty":                {func(l [][]byte) []byte { return bytes.Join(slices.Insert(l, 4, []byte("\n")), nil) }, audit.RuleForm},
		"the end is cut off":             {func(l [][]byte) []byte { return bytes.Join(l[:14], nil) }, audit.RuleTruncated},
		"the file ends inside of a line": {func(l [][]byte) []byte { b := bytes.Join(l, nil); return b[:len(b)-200] }, audit.RuleTruncated},
		"there is nothing but a head":    {func(l [][]byte) []byte { return l[0] }, audit.RuleTruncated},
		"there is nothing":               {func([][]byte) []byte { return nil }, audit.RuleTruncated},
		"something follows the end":      {func(l [][]byte) []byte { return bytes.Join(append(l, []byte("{}\n")), nil) }, audit.RuleForm},
		"another agent's line":           {func(l [][]byte) []byte { l[5] = foreign[5]; return bytes.Join(slices.Insert(l, 2, foreign[1]), nil) }, audit.RuleAgent},
		"another agent's whole export": {func(l [][]byte) []byte {
			return bytes.ReplaceAll(bytes.Join(foreign, nil), []byte(`"agent":"spiffe://example.org/agent/b","checkpoint"`), []byte(`"agent":"spiffe://example.org/agent/a","checkpoint"`))
		}, audit.RuleAgent},
		"another agent's head":             {func(l [][]byte) []byte { l[0], l[1] = foreign[0], foreign[1]; return bytes.Join(l, nil) }, audit.RuleCertificate},
		"an entry of another CA's agent":   {func(l [][]byte) []byte { return forged.export(t, audit.ExportOptions{}) }, audit.RuleHeadKey},
		"the head is over fewer entries":   {swap(head, strings.Replace(text, "\n12\n", "\n11\n", 1)+"\n\n"+sig), audit.RuleHeadSignature},
		"the head is later":                {swap(head, strings.Replace(text, "\ntime 2", "\ntime 3", 1)+"\n\n"+sig), audit.RuleHeadKey},
		"the head has another root":        {swap(head, strings.Replace(text, "\n12\n", "\n12\nAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=", 1)+"\n\n"+sig), audit.RuleHead},
		"the head's signature is forged":   {swap(head, text+"\n\n"+lastByte(sig)), audit.RuleHeadSignature},
		"the head is by another key":       {swap(head, resign(t, text+"\n", other.agent.Key)), audit.RuleHeadKey},
		"the head is in another name":      {swap(head, strings.Replace(head, "— inkan-record", "— Inkan-record", 1)), audit.RuleHead},
		"the head's certificate is absent": {func(l [][]byte) []byte { return bytes.Join(slices.Delete(l, 1, 2), nil) }, audit.RuleForm},
		"a proof has a signed action":      {edit(3, `index 1`, `index 01`), audit.RuleProof},
		"a filter is put in":               {edit(0, `"checkpoint"`, `"filter":{"instrument":"isin:US0378331005"},"checkpoint"`), audit.RuleFilter},
		"the version is unknown":           {edit(0, `"version":1`, `"version":2`), audit.RuleForm},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := d.verifyExport(c.change(slices.Clone(mine)))
			u, ok := errors.AsType[*audit.Unproven](err)
			if !ok || u.Rule != c.want {
				t.Errorf("got %v, want %s", err, c.want)
			}
		})
	}
	if _, err := d.verifyExport(export); err != nil {
		t.Errorf("unchanged: %v", err)
	}
	if _, err := audit.VerifyExport(t.Context(), bytes.NewReader(export), audit.VerifyOptions{Roots: stranger.Roots}); err == nil {
		t.Error("it verifies under another CA")
	}
}

// quoted is a text as it stands in a JSON string.
func quoted(s string) []byte {
	b, err := json.Marshal(s)
	if err != nil {
		panic(err)
	}
	return b[1 : len(b)-1]
}

func resign(t testing.TB, text string, key crypto.Signer) string {
	t.Helper()
	sum := sha256.Sum256([]byte(text))
	sig, err := key.Sign(nil, sum[:], crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	id := sha256.Sum256(spki)
	name, _, _ := strings.Cut(text, "\n")
	return text + "\n— " + name + " " + base64.StdEncoding.EncodeToString(append(id[:4], sig...)) + "\n"
}

func member(line []byte, name string) (whole, value []byte) {
	i := bytes.Index(line, []byte(`"`+name+`":"`))
	j := i + len(name) + 4
	k := j
	for line[k] != '"' || line[k-1] == '\\' {
		k++
	}
	return line[i : k+1], line[j:k]
}

func cutMember(l [][]byte, i int, name string) []byte {
	whole, _ := member(l[i], name)
	l[i] = bytes.Replace(l[i], append(slices.Clone(whole), ','), nil, 1)
	return bytes.Join(l, nil)
}

func swapMember(t testing.TB, l [][]byte, i, j int, name string) []byte {
	t.Helper()
	whole, _ := member(l[i], name)
	with, _ := member(l[j], name)
	l[i] = bytes.Replace(l[i], whole, with, 1)
	return bytes.Join(l, nil)
}

// TestExportPeriod: a part of a record says what it proves, and no more.
func TestExportPeriod(t *testing.T) {
	d := newDesk(t)
	begun := time.Now().UTC().Truncate(time.Microsecond)
	clock := begun
	if err := d.log.Close(); err != nil {
		t.Fatal(err)
	}
	var err error
	if d.log, err = audit.Open(t.Context(), d.path, audit.Options{Now: func() time.Time { return clock }}); err != nil {
		t.Fatal(err)
	}
	defer d.log.Close()
	for n := range uint64(10) { // at 0, 1 ... 9 seconds
		clock = begun.Add(time.Duration(n) * time.Second)
		p, err := scope.Check(d.scope, action(n, "100"), scope.Env{Now: clock, AttestedAt: begun})
		if err != nil {
			t.Fatal(err)
		}
		r, err := d.log.Record(t.Context(), p, d.id)
		if err != nil {
			t.Fatal(err)
		}
		d.sign(t, r)
	}
	clock = begun.Add(20 * time.Second)
	d.seal(t)
	at := func(s float64) *scope.Timestamp {
		return &scope.Timestamp{Time: begun.Add(time.Duration(s * float64(time.Second)))}
	}
	for name, c := range map[string]struct {
		f                 audit.Filter
		entries, lines    uint64
		complete, limited bool
	}{
		"all":                      {audit.Filter{}, 10, 10, true, true},
		"from the middle":          {audit.Filter{From: at(4)}, 6, 7, true, false},
		"to the middle":            {audit.Filter{To: at(4)}, 4, 5, true, false},
		"between":                  {audit.Filter{From: at(2.5), To: at(7.5)}, 5, 7, true, false},
		"before the first":         {audit.Filter{From: at(-9), To: at(0)}, 0, 1, true, false},
		"between two":              {audit.Filter{From: at(2.1), To: at(2.2)}, 0, 2, true, false},
		"after the last":           {audit.Filter{From: at(15)}, 0, 1, true, false},
		"beyond the head":          {audit.Filter{From: at(5), To: at(100)}, 5, 6, true, false},
		"wholly beyond the head":   {audit.Filter{From: at(50), To: at(100)}, 0, 1, false, false},
		"an instrument":            {audit.Filter{Instrument: "isin:FR0000120271"}, 10, 10, false, false},
		"an instrument in between": {audit.Filter{Instrument: "isin:FR0000120271", From: at(2.5), To: at(7.5)}, 5, 5, false, false},
		"another instrument":       {audit.Filter{Instrument: "isin:US0378331005"}, 0, 0, false, false},
	} {
		t.Run(name, func(t *testing.T) {
			export := d.export(t, audit.ExportOptions{Filter: c.f})
			reports, err := d.verifyExport(export)
			if err != nil {
				t.Fatal(err)
			}
			r := reports[0]
			if got := uint64(bytes.Count(export, []byte(`{"kind":"entry"`))); r.Entries != c.entries || got != c.lines {
				t.Errorf("%d entries in %d lines, want %d in %d", r.Entries, got, c.entries, c.lines)
			}
			if got := claim(t, r, "complete"); got.Proven != c.complete {
				t.Errorf("complete: %+v", got)
			}
			if got := claim(t, r, "limits_over_time"); got.Proven != c.limited {
				t.Errorf("limits over time: %+v", got)
			}
			// Without any one of its lines a period does not verify.
			l := bytes.SplitAfter(export, []byte("\n"))
			for i := range c.lines {
				short := slices.Delete(slices.Clone(l), int(2+i), int(3+i))
				short[len(short)-2] = fmt.Appendf(nil, `{"kind":"end","entries":%d}`+"\n", c.lines-1)
				_, err := d.verifyExport(bytes.Join(short, nil))
				if u, ok := errors.AsType[*audit.Unproven](err); c.f.Instrument == "" && (!ok || u.Rule != audit.RuleMissing && u.Rule != audit.RuleTruncated) {
					t.Errorf("without line %d: %v", i, err)
				}
			}
		})
	}
}

func TestExportCSV(t *testing.T) {
	d := filled(t, 3)
	hostile := []string{`=HYPERLINK("http://x","y")`, "+1+1", "@SUM(A1)", "-2+3", "\t=1", "a\"b,c\r\nd", "＝1+1", "|calc"}
	for i, text := range hostile {
		if err := d.log.Refuse(t.Context(), action(uint64(2000+i), "501"), &scope.Refusal{Rule: scope.RuleOrderNotional, Message: text}, d.id); err != nil {
			t.Fatal(err)
		}
	}
	d.seal(t)
	b := d.export(t, audit.ExportOptions{CSV: true})
	if !bytes.Contains(b, []byte("\r\n")) || bytes.Count(b, []byte("\r\n")) < 13 {
		t.Error("lines do not end with CRLF (RFC 4180, section 2)")
	}
	rows, err := csv.NewReader(bytes.NewReader(b)).ReadAll()
	if err != nil {
		t.Fatal(err)
	}
	if len(rows) != 1+4+len(hostile) || !slices.Equal(rows[0][:len(audit.FieldNames())], audit.FieldNames()) {
		t.Fatalf("%d rows, the first %q", len(rows), rows[0])
	}
	message := slices.Index(rows[0], "message")
	for i, row := range rows[5:] {
		want := strings.ReplaceAll(hostile[i], "\r\n", "\n") // as the reader of this test has it
		if got := row[message]; got != "'"+want && (i != 5 || got != want) {
			t.Errorf("%q stands there as %q", hostile[i], got)
		}
		for j, cell := range row {
			if cell != "" && strings.ContainsAny(cell[:1], "=+@\t\r|") {
				t.Errorf("row %d, %s: %q would be taken for a formula", i, rows[0][j], cell)
			}
		}
	}
}

// TestHeadIsNoAction: what is signed as a head verifies as nothing else, and the other way round.
func TestHeadIsNoAction(t *testing.T) {
	d := filled(t, 1)
	s, err := d.log.Seal(t.Context(), d.id)
	if err != nil {
		t.Fatal(err)
	}
	text, err := s.Spend()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Spend(); !errors.Is(err, audit.ErrSpent) {
		t.Errorf("spent twice: %v", err)
	}
	if !bytes.HasPrefix(text, []byte("inkan-record/v1/example.org/agent/a\n")) {
		t.Errorf("the head begins with %q", text)
	}
	if _, err := jws.Split(text); err == nil {
		t.Error("a head is a JWS")
	}
	sig, err := jws.Sign(d.agent.Key, text)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := jws.Split([]byte(jws.Compact(text, sig))); err == nil {
		t.Error("a signed head is a JWS")
	}
	r := d.record(t, 7)
	statement, err := r.Spend()
	if err != nil {
		t.Fatal(err)
	}
	h, err := jws.NewHeader("ES256", d.agent.Chain, true)
	if err != nil {
		t.Fatal(err)
	}
	for what, text := range map[string]string{"signing input": string(h.SigningInput(statement)), "statement": string(statement)} {
		if _, err := audit.ParseCheckpoint(text); err == nil {
			t.Errorf("a %s is a head", what)
		}
		if _, err := audit.OpenCheckpoint(resign(t, text, d.agent.Key)); err == nil {
			t.Errorf("a signed %s is a head", what)
		}
	}
	// A seal that is none is not kept, nor one with another's signature.
	if _, err := d.log.KeepSeal(t.Context(), &audit.Seal{}, d.agent.Key.Public(), sig); err == nil {
		t.Error("a seal that Seal did not make was kept")
	}
	if _, err := d.log.KeepSeal(t.Context(), s, d.agent.Key.Public(), sig[:63]); err == nil {
		t.Error("a signature that does not verify was kept")
	}
	if _, err := d.log.Seal(t.Context(), audit.Identity{Agent: "https://example.org/agent/a"}); err == nil {
		t.Error("an agent without a SPIFFE ID got a head")
	}
}

// TestTimeAfterHead: nothing is recorded with a time before a head that was sealed.
func TestTimeAfterHead(t *testing.T) {
	d := filled(t, 1)
	s, err := d.log.Seal(t.Context(), d.id)
	if err != nil {
		t.Fatal(err)
	}
	sealed := s.Checkpoint().Time
	p, err := scope.Check(d.scope, action(9, "100"), scope.Env{Now: sealed.Add(-time.Minute), AttestedAt: time.Now()})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.log.Record(t.Context(), p, d.id); err != nil {
		t.Fatal(err)
	}
	if at := d.log.Head().Time; at.Before(sealed) {
		t.Errorf("an entry of %v follows a head of %v", at, sealed)
	}
	kept := d.seal(t)
	c, err := audit.OpenCheckpoint(kept)
	if err != nil {
		t.Fatal(err)
	}
	// Opened with a clock that was set back, it still holds.
	if err := d.log.Close(); err != nil {
		t.Fatal(err)
	}
	l, err := audit.Open(t.Context(), d.path, audit.Options{Now: func() time.Time { return c.Time.Add(-time.Hour) }})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if at := l.Head().Time; at.Before(c.Time) {
		t.Errorf("after opening, time is %v, the head is of %v", at, c.Time)
	}
}

func FuzzCheckpoint(f *testing.F) {
	f.Add("inkan-record/v1/example.org/agent/a\n3\nAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\ntime 2026-07-27T09:30:00.123456Z\ncertificate AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA\n")
	f.Fuzz(func(t *testing.T, text string) {
		c, err := audit.ParseCheckpoint(text)
		if err == nil && c.Text() != text {
			t.Errorf("%q parses and is written as %q", text, c.Text())
		}
	})
}

func FuzzExport(f *testing.F) {
	d := filled(f, 3)
	export := d.export(f, audit.ExportOptions{})
	f.Add(export)
	root := lines(f, export)[0]["checkpoint"]
	f.Fuzz(func(t *testing.T, b []byte) {
		reports, err := d.verifyExport(b)
		if err != nil {
			return
		}
		for i, r := range reports { // white space may differ, what is said may not
			if r.Filter == nil && (r.Entries != 4 || r.Signed != 3) {
				t.Errorf("export %d verifies with %d entries under %v", i, r.Entries, root)
			}
		}
	})
}

// TestFilterOfAnything: the filter of an export is no place for sentences, which would
// stand among what was proven.
func TestFilterOfAnything(t *testing.T) {
	d := newDesk(t)
	d.sign(t, d.record(t, 1))
	d.seal(t)
	const none = "isin:DE000A0F5UH1"
	text := string(d.export(t, audit.ExportOptions{Filter: audit.Filter{Instrument: none}}))
	if _, err := audit.VerifyExport(t.Context(), strings.NewReader(text), audit.VerifyOptions{Roots: d.ca.Roots}); err != nil {
		t.Fatal(err)
	}
	for _, bad := range []string{`x\nIt proves:\n  - All of it.`, `\u001b[2J`, "FR0000120271", "isin:DE000A0F5UH2"} {
		_, err := audit.VerifyExport(t.Context(), strings.NewReader(strings.Replace(text, none, bad, 1)), audit.VerifyOptions{Roots: d.ca.Roots})
		if u, ok := errors.AsType[*audit.Unproven](err); !ok || u.Rule != audit.RuleForm {
			t.Errorf("%s: %v", bad, err)
		}
	}
}
