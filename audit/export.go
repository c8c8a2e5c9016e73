package audit

import (
	"bufio"
	"context"
	"crypto/sha256"
	"crypto/x509"
	_ "embed" // the schema
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"golang.org/x/mod/sumdb/tlog"

	"inkan/internal/certext"
	"inkan/internal/strictjson"
	"inkan/scope"
)

// ErrNoHead: the record has no signed head, so nothing of it can be proven apart from it.
var ErrNoHead = errors.New("the record has no signed head yet: ask the signer for one with inkan audit checkpoint, or stop it")

// ExportVersion is the version of the export's form.
const ExportVersion = 1

// ExportSchema is the JSON Schema of a line of an export.
//
//go:embed schema/export.schema.json
var ExportSchema []byte

// Kinds of lines of an export.
const (
	kindHead        = "head"
	kindCertificate = "certificate"
	kindStart       = "start"
	kindEntry       = "entry"
	kindEnd         = "end"
)

// maxLine bounds a line of an export, in bytes: a statement twice, once as JSON
// text, and a JWS that has it in base64.
const maxLine = 1 << 20

// Filter says which entries an export has. The zero value is all of them.
type Filter struct {
	From       *scope.Timestamp `json:"from,omitempty"` // inclusive
	To         *scope.Timestamp `json:"to,omitempty"`   // exclusive
	Instrument string           `json:"instrument,omitempty"`
}

// All says whether the filter selects everything.
func (f *Filter) All() bool { return f == nil || *f == Filter{} }

func (f *Filter) String() string {
	if f.All() {
		return "all entries"
	}
	var parts []string
	if f.From != nil {
		parts = append(parts, "from "+f.From.Time.UTC().Format(scope.TimeFormat))
	}
	if f.To != nil {
		parts = append(parts, "before "+f.To.Time.UTC().Format(scope.TimeFormat))
	}
	if f.Instrument != "" {
		parts = append(parts, "in "+f.Instrument)
	}
	return "entries " + strings.Join(parts, ", ")
}

func (f *Filter) early(st *scope.Statement) bool {
	return f.From != nil && st.Time.Time.Before(f.From.Time)
}

func (f *Filter) late(st *scope.Statement) bool {
	return f.To != nil && !st.Time.Time.Before(f.To.Time)
}

func (f *Filter) selects(st *scope.Statement) bool {
	return !f.early(st) && !f.late(st) && (f.Instrument == "" || st.Action().Instrument() == f.Instrument)
}

// exportLine is one line of an export.
type exportLine struct {
	Kind string `json:"kind"`

	// head
	Version    int     `json:"version,omitzero"`
	Agent      string  `json:"agent,omitzero"`
	Filter     *Filter `json:"filter,omitempty"`
	Checkpoint string  `json:"checkpoint,omitzero"`

	// certificate
	Chain [][]byte `json:"chain,omitempty"` // DER, leaf first

	// start
	Document string `json:"document,omitzero"` // the exact bytes

	// entry
	Fields    *Fields `json:"fields,omitempty"`
	Statement string  `json:"statement,omitzero"` // the exact bytes
	JWS       string  `json:"jws,omitzero"`
	Proof     string  `json:"proof,omitzero"`
	Context   bool    `json:"context,omitzero"` // beside the period that is exported, not in it

	// end
	Entries uint64 `json:"entries,omitzero"` // lines of the kind entry before it
}

// ExportOptions say what is exported, and how.
type ExportOptions struct {
	Filter   Filter
	CSV      bool
	Progress func(done, total uint64) // may be nil
}

// Exported says what an export has.
type Exported struct {
	Agent   string      `json:"agent"`
	Entries uint64      `json:"entries"`
	Head    *Checkpoint `json:"head"`
	After   uint64      `json:"after"` // entries of the record that follow the head and are not in the export
}

// Checkpoint returns the record's latest signed head, unverified, or [ErrNoHead].
func (s *Snapshot) Checkpoint(ctx context.Context) (*Checkpoint, error) {
	c, _, err := s.checkpoint(ctx)
	return c, err
}

func (s *Snapshot) checkpoint(ctx context.Context) (*Checkpoint, string, error) {
	note, err := latestCheckpoint(ctx, s.tx)
	if err != nil {
		return nil, "", err
	}
	if note == "" {
		return nil, "", ErrNoHead
	}
	c, err := OpenCheckpoint(note)
	if err != nil {
		return nil, "", fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if c.Size > s.Head.Size {
		return nil, "", fmt.Errorf("%w: its head says %d entries, %d are there", ErrDamaged, c.Size, s.Head.Size)
	}
	return c, note, nil
}

// Export writes entries of the record up to its latest signed head, each with
// its proof. Nothing is verified here.
func (s *Snapshot) Export(ctx context.Context, w io.Writer, o ExportOptions) (*Exported, error) {
	c, note, err := s.checkpoint(ctx)
	if err != nil {
		return nil, err
	}
	x := &exporter{o: o, note: note, head: c, hashes: s.hashReader(ctx), certificates: make(map[scope.Digest]*certext.ActionCertificate)}
	if x.stored, err = s.chains(ctx); err != nil {
		return nil, err
	}
	if x.starts, err = s.starts(ctx); err != nil {
		return nil, err
	}
	out := bufio.NewWriterSize(w, 1<<18)
	if o.CSV {
		x.csv = csv.NewWriter(out)
		x.csv.UseCRLF = true // RFC 4180, section 2
		if err := x.csv.Write(append(FieldNames(), "statement", "jws", "proof")); err != nil {
			return nil, err
		}
	} else {
		x.json = json.NewEncoder(out)
		x.json.SetEscapeHTML(false)
	}
	if err := x.write(ctx, s); err != nil {
		return nil, err
	}
	if x.csv != nil {
		x.csv.Flush()
		if err := x.csv.Error(); err != nil {
			return nil, err
		}
	}
	return &Exported{Agent: c.Agent, Entries: x.entries, Head: c, After: s.Head.Size - c.Size}, out.Flush()
}

type exporter struct {
	o            ExportOptions
	note         string
	head         *Checkpoint
	hashes       tlog.HashReader
	stored       map[[32]byte][]byte
	certificates map[scope.Digest]*certext.ActionCertificate
	starts       map[[32]byte][]byte // those that were not written yet
	csv          *csv.Writer
	json         *json.Encoder
	entries      uint64
}

func (x *exporter) line(l *exportLine) error {
	if x.json == nil {
		return nil
	}
	return x.json.Encode(l)
}

func (x *exporter) write(ctx context.Context, s *Snapshot) error {
	head := &exportLine{Kind: kindHead, Version: ExportVersion, Agent: x.head.Agent, Checkpoint: x.note}
	if !x.o.Filter.All() {
		head.Filter = &x.o.Filter
	}
	if err := x.line(head); err != nil {
		return err
	}
	if _, err := x.certificate(x.head.Certificate); err != nil {
		return err
	}
	first, err := s.begin(ctx, &x.o.Filter, x.head.Size)
	if err != nil {
		return err
	}
	for e, err := range s.entries(ctx, first, x.head.Size) {
		if err != nil {
			return err
		}
		st, err := scope.ParseStatement(e.Statement)
		if err != nil {
			return fmt.Errorf("%w: entry %d: %w", ErrDamaged, e.Counter, err)
		}
		done, err := x.entry(e, st)
		if err != nil {
			return fmt.Errorf("entry %d: %w", e.Counter, err)
		}
		if x.o.Progress != nil && e.Counter%1024 == 0 {
			x.o.Progress(e.Counter-first+1, x.head.Size-first+1)
		}
		if done {
			break
		}
	}
	return x.line(&exportLine{Kind: kindEnd, Entries: x.entries})
}

// entry writes one entry if it is selected, or stands beside a period. After
// the end of the period it is done.
func (x *exporter) entry(e Entry, st *scope.Statement) (done bool, err error) {
	f := &x.o.Filter
	done = f.late(st)
	beside := done || f.early(st)
	if beside && (f.Instrument != "" || x.csv != nil) || !beside && !f.selects(st) {
		return done, nil
	}
	cert, err := x.certificate(st.Decision.Certificate)
	if err != nil {
		return done, err
	}
	if st.Run != nil {
		if doc, ok := x.starts[st.Run.Start]; ok {
			delete(x.starts, st.Run.Start)
			if err := x.line(&exportLine{Kind: kindStart, Document: string(doc)}); err != nil {
				return done, err
			}
		}
	}
	p, err := tlog.ProveRecord(int64(x.head.Size), int64(e.Counter)-1, x.hashes)
	if err != nil {
		return done, err
	}
	x.entries++
	proof := formatProof(e.Counter-1, p, x.note)
	fields := fieldsOf(st, cert, e.JWS != "")
	if x.csv == nil {
		return done, x.line(&exportLine{Kind: kindEntry, Fields: fields, Statement: string(e.Statement), JWS: e.JWS, Proof: proof, Context: beside})
	}
	row := append(fields.values(), string(e.Statement), e.JWS, proof)
	for i := range row {
		row[i] = harmless(row[i])
	}
	return done, x.csv.Write(row)
}

// harmless puts an apostrophe before a text that a spreadsheet would take for a
// formula. Numbers are left as they are.
func harmless(s string) string {
	if s == "" || !strings.ContainsAny(s[:1], "=+-@\t\r\n|%") && !strings.HasPrefix(s, "＝") && !strings.HasPrefix(s, "＋") && !strings.HasPrefix(s, "－") && !strings.HasPrefix(s, "＠") {
		return s
	}
	if number := strings.TrimPrefix(s, "-"); number != "" && strings.Trim(number, "0123456789.") == "" {
		return s
	}
	return "'" + s
}

// certificate writes a certificate's chain before it is first used.
func (x *exporter) certificate(sum scope.Digest) (*certext.ActionCertificate, error) {
	if c, ok := x.certificates[sum]; ok {
		return c, nil
	}
	list, err := x509.ParseCertificates(x.stored[[32]byte(sum)])
	if err != nil || len(list) == 0 {
		return nil, fmt.Errorf("%w: its certificate is not in the record", ErrDamaged)
	}
	c, err := certext.ParseAction(list[0])
	if err != nil {
		return nil, fmt.Errorf("%w: its certificate: %w", ErrDamaged, err)
	}
	x.certificates[sum] = c
	var chain [][]byte
	for _, i := range list {
		chain = append(chain, i.Raw)
	}
	return c, x.line(&exportLine{Kind: kindCertificate, Chain: chain})
}

// begin returns the number of the last entry before a period, by which the
// export shows that none of it is missing, or 1.
func (s *Snapshot) begin(ctx context.Context, f *Filter, size uint64) (uint64, error) {
	if f.From == nil {
		return 1, nil
	}
	low, high := uint64(1), size+1 // the first entry of the period is in [low, high]
	for low < high {
		mid := (low + high) / 2
		var b []byte
		if err := s.tx.QueryRowContext(ctx, "SELECT statement FROM leaf WHERE counter = ?", mid).Scan(&b); err != nil {
			return 0, fmt.Errorf("%w: entry %d: %w", ErrDamaged, mid, err)
		}
		st, err := scope.ParseStatement(b)
		if err != nil {
			return 0, fmt.Errorf("%w: entry %d: %w", ErrDamaged, mid, err)
		}
		if f.early(st) {
			low = mid + 1
		} else {
			high = mid
		}
	}
	return max(low-1, 1), nil
}

// VerifyExport verifies an export, which may be several joined, with nothing
// but the CA's roots. Memory is bounded, whatever its length.
func VerifyExport(ctx context.Context, r io.Reader, o VerifyOptions) ([]*Report, error) {
	in := &exportReader{r: bufio.NewReaderSize(r, 1<<18)}
	var out []*Report
	for {
		head, err := in.next()
		if errors.Is(err, io.EOF) && len(out) > 0 {
			return out, nil
		}
		if errors.Is(err, io.EOF) {
			return nil, unproven(RuleTruncated, 0, "the export is empty")
		}
		if err != nil {
			return nil, err
		}
		report, err := verifySection(ctx, in, head, o)
		if err != nil {
			return nil, err
		}
		out = append(out, report)
	}
}

// exportReader reads lines.
type exportReader struct {
	r      *bufio.Reader
	number int
}

// next returns a line without its end. It is the caller's.
func (in *exportReader) next() ([]byte, error) {
	var line []byte
	for {
		part, err := in.r.ReadSlice('\n')
		line = append(line, part...)
		switch {
		case len(line) > maxLine:
			return nil, unproven(RuleForm, 0, "line %d is longer than %d bytes", in.number+1, maxLine)
		case errors.Is(err, bufio.ErrBufferFull):
		case errors.Is(err, io.EOF) && len(line) == 0:
			return nil, io.EOF
		case errors.Is(err, io.EOF):
			return nil, unproven(RuleTruncated, 0, "line %d has no end", in.number+1)
		case err != nil:
			return nil, fmt.Errorf("reading the export: %w", err)
		default:
			in.number++
			return line[:len(line)-1], nil
		}
	}
}

// section is one export as its head describes it.
type section struct {
	v      *verification
	in     *exportReader
	note   string
	head   *Checkpoint
	filter Filter
	before bool   // an entry from before the period was shown
	after  bool   // and one from after it
	count  uint64 // entries that were read, context included; next's
	number uint64 // of the last one
	first  uint64 // and of the first one
	ended  bool
	lines  uint64 // of the kind entry; the source's
	kept   int    // bytes of certificates and start documents; the source's
}

func verifySection(ctx context.Context, in *exportReader, raw []byte, o VerifyOptions) (*Report, error) {
	v := newVerification(o)
	v.stored, v.starts = make(map[[32]byte][]byte), make(map[[32]byte][]byte)
	s := &section{v: v, in: in}
	line, err := decodeLine(raw, in.number)
	switch {
	case err != nil:
		return nil, err
	case line.Kind != kindHead:
		return nil, unproven(RuleForm, 0, "line %d: a head is expected first, not %.16q", in.number, line.Kind)
	case line.Version != ExportVersion:
		return nil, unproven(RuleForm, 0, "line %d: the export has version %d, this program knows %d", in.number, line.Version, ExportVersion)
	}
	if line.Filter != nil {
		s.filter = *line.Filter
	}
	// Nobody signs a filter, and claims have its text in them.
	if f := &s.filter; f.Instrument != "" && !scope.ValidInstrument(f.Instrument) {
		return nil, unproven(RuleForm, 0, "line %d: the filter: %.80q is not an instrument", in.number, f.Instrument)
	}
	// The certificate of the head follows it.
	if raw, err = in.next(); errors.Is(err, io.EOF) {
		return nil, unproven(RuleTruncated, 0, "the export ends after its head")
	} else if err != nil {
		return nil, err
	}
	c, err := decodeLine(raw, in.number)
	if err != nil {
		return nil, err
	}
	if err := s.keep(c); err != nil {
		return nil, err
	}
	s.note = line.Checkpoint
	if s.head, err = v.head(line.Checkpoint); err != nil {
		return nil, err
	}
	if s.head.Agent != line.Agent {
		return nil, unproven(RuleAgent, 0, "the export says it is of %.80q, its head is of %s", line.Agent, s.head.Agent)
	}
	v.report.Agent, v.report.Head = s.head.Agent, s.head
	if o.Head != nil {
		o.Head(s.head, &s.filter)
	}
	next := s.next
	if s.filter.All() {
		next = s.whole
	}
	if err := v.run(ctx, s.jobs, s.head.Size, next); err != nil {
		return nil, err
	}
	return s.finish()
}

func decodeLine(raw []byte, number int) (*exportLine, error) {
	var l exportLine
	if err := strictjson.Unmarshal(raw, maxLine, &l); err != nil {
		return nil, unproven(RuleForm, 0, "line %d: %v", number, err)
	}
	return &l, nil
}

// keep takes a line with what entries name by its digest.
func (s *section) keep(l *exportLine) error {
	content, to := []byte(l.Document), s.v.starts
	switch {
	case l.Kind == kindCertificate && len(l.Chain) > 0 && len(l.Chain) <= 8:
		content, to = slices.Concat(l.Chain...), s.v.stored
	case l.Kind != kindStart || l.Document == "":
		return unproven(RuleForm, 0, "line %d: a certificate chain or a start document is expected", s.in.number)
	}
	if s.kept += len(content); s.kept > maxKept {
		return unproven(RuleForm, 0, "line %d: more than %d bytes of certificates and start documents", s.in.number, maxKept)
	}
	sum := sha256.Sum256(content)
	if l.Kind == kindCertificate {
		sum = sha256.Sum256(l.Chain[0])
	}
	s.v.mu.Lock()
	defer s.v.mu.Unlock()
	to[sum] = content
	return nil
}

// maxKept bounds what an export has beside its entries, in bytes: 20 years of two certificates a day.
const maxKept = 64 << 20

// jobs reads the section's entries up to its end.
func (s *section) jobs(yield func(*job, error) bool) {
	for {
		raw, err := s.in.next()
		if errors.Is(err, io.EOF) {
			err = unproven(RuleTruncated, 0, "the export has no end: lines are missing after line %d", s.in.number)
		}
		if err != nil {
			yield(nil, err)
			return
		}
		// Entries, the bulk, are parsed on all cores; others here, before what follows.
		if !strings.HasPrefix(string(raw[:min(len(raw), 16)]), `{"kind":"entry"`) {
			l, err := decodeLine(raw, s.in.number)
			if err == nil && l.Kind == kindEnd {
				if s.ended = true; l.Entries != s.lines {
					yield(nil, unproven(RuleTruncated, 0, "the export's end says %d entries, %d are there", l.Entries, s.lines))
				}
				return
			}
			if err == nil {
				err = s.keep(l)
			}
			if err != nil {
				yield(nil, err)
				return
			}
			continue
		}
		s.lines++
		if !yield(&job{raw: raw, section: s, entry: Entry{}}, nil) {
			return
		}
	}
}

// parse takes an entry's line apart.
func (j *job) parse() error {
	var l exportLine
	if err := strictjson.Unmarshal(j.raw, maxLine, &l); err != nil {
		return unproven(RuleForm, 0, "an entry's line: %v", err)
	}
	j.raw = nil
	if l.Kind != kindEntry || l.Fields == nil || l.Statement == "" || l.Proof == "" {
		return unproven(RuleForm, 0, "an entry's line: fields, statement and proof are expected")
	}
	j.line, j.entry.Statement, j.entry.JWS = &l, []byte(l.Statement), l.JWS
	return nil
}

// proven checks that an entry is in the tree under the head, at its place, and
// that what the line says beside it is so.
func (j *job) proven() error {
	n, s := j.entry.Counter, j.section
	if j.statement.Agent != s.head.Agent {
		return unproven(RuleAgent, n, "the statement is of another agent, %s", j.statement.Agent)
	}
	index, p, note, err := parseProof(j.line.Proof)
	switch {
	case err != nil:
		return unproven(RuleProof, n, "%v", err)
	case note != s.note:
		return unproven(RuleProof, n, "its proof is for another head than the export's")
	case n > s.head.Size || index != n-1:
		return unproven(RuleProof, n, "its proof is for another number, %d", index+1)
	}
	if err := tlog.CheckRecord(p, int64(s.head.Size), tlog.Hash(s.head.Root), int64(index), tlog.RecordHash(j.entry.Statement)); err != nil {
		return unproven(RuleProof, n, "it is not in the tree under the head")
	}
	if *j.line.Fields != *fieldsOf(j.statement, j.cert.action, j.entry.JWS != "") {
		return unproven(RuleFields, n, "its fields say something else than its statement")
	}
	return nil
}

// whole checks the next entry of an export that has all entries.
func (s *section) whole(j *job) error {
	if j.err == nil && j.line.Context {
		return unproven(RuleFilter, j.entry.Counter, "an export of all entries has nothing beside them")
	}
	s.number = j.entry.Counter
	return s.v.next(j)
}

// next checks the next entry of an export that has some.
func (s *section) next(j *job) error {
	if j.err != nil {
		return j.err
	}
	n, st, f := j.entry.Counter, j.statement, &s.filter
	switch {
	case n <= s.number:
		return unproven(RuleOrder, n, "it stands after entry %d", s.number)
	case s.number != 0 && n > s.number+1 && f.Instrument == "":
		return unproven(RuleMissing, s.number+1, "it is missing, later ones are there")
	case s.after || j.line.Context == f.selects(st) || j.line.Context && f.Instrument != "":
		return unproven(RuleFilter, n, "the export is of %s, and this is not what is expected there", f)
	case st.Time.Time.Before(s.v.last):
		return unproven(RuleOrder, n, "the statement is earlier than its predecessor")
	case st.Time.Time.After(s.head.Time):
		return unproven(RuleHead, n, "the statement is later than the head that it is under")
	case n == s.number+1 && s.number != 0 && st.Previous != scope.Digest(s.v.previous):
		return unproven(RuleOrder, n, "the statement names another predecessor")
	}
	if j.line.Context {
		s.before, s.after = s.before || f.early(st), f.late(st)
		if s.before && s.count > 0 && f.early(st) {
			return unproven(RuleFilter, n, "more than one entry from before the period")
		}
	}
	if s.count++; s.count == 1 {
		s.first = n
	}
	s.number = n
	s.v.count(j)
	return nil
}

func (s *section) finish() (*Report, error) {
	v, r, f := s.v, s.v.report, &s.filter
	if !s.ended {
		return nil, unproven(RuleTruncated, 0, "the export has no end")
	}
	r.Root, r.Certificates = fmt.Sprintf("%x", s.head.Root[:]), len(v.used)
	at := s.head.Time.Format(scope.TimeFormat)
	r.claim("authentic", true, "Every entry is in the tree whose head the device signed; every stored signature is the certified key's, over exactly the entry; every certificate chains to this CA.")
	r.claim("in_scope", true, "Every permit was inside the scope of a certificate that was valid at its time.")
	if f.All() {
		switch {
		case r.Entries < s.head.Size:
			return nil, unproven(RuleTruncated, 0, "the head was signed over %d entries, %d are there", s.head.Size, r.Entries)
		case r.Last.After(s.head.Time):
			return nil, unproven(RuleHead, 0, "the head is earlier than its last entry")
		case v.root() != tlog.Hash(s.head.Root):
			return nil, unproven(RuleHead, 0, "the entries do not lead to the head's root")
		}
		r.claim("limits_over_time", true, "Limits over time were held: they were added up anew from the entries.")
		r.claim("in_order", true, "Entries are numbered without gaps, each names its predecessor, and times do not go back.")
		r.claim("complete", true, fmt.Sprintf("The record held exactly these %d entries at %s: the device signed that head.", r.Entries, at))
	} else {
		r.Filter = f
		r.claim("limits_over_time", false, "That limits over time were held: that takes the entries before these.")
		r.claim("in_order", true, "Each entry stands in the record under its number, and times do not go back.")
		if err := s.complete(); err != nil {
			return nil, err
		}
	}
	r.claim("nothing_after", false, "That nothing was done after "+at+": ask for a later export, or compare with the latest signed action that a venue has, which names its number.")
	v.claimRest()
	return r, nil
}

// complete says whether a part of a record has all that its filter selects.
// Times do not go back in a record, so a period is complete when the numbers have
// no gap and the entries beside it are outside of it.
func (s *section) complete() error {
	r, f := s.v.report, &s.filter
	if f.Instrument != "" {
		r.claim("complete", false, fmt.Sprintf("That these %d entries are all in %s: the %d others of the record were left out, and whether one of them belongs here only they would show.", r.Entries, f.Instrument, s.head.Size-r.Entries))
		return nil
	}
	begins := s.before || s.first == 1 || s.head.Size == 0
	ends := s.after || s.number == s.head.Size
	if !begins || !ends {
		return unproven(RuleTruncated, 0, "the entry that shows where the period begins or ends is missing")
	}
	until := s.head.Time
	if f.To != nil && f.To.Time.Before(until) {
		until = f.To.Time
	}
	if f.From != nil && !f.From.Time.Before(until) {
		r.claim("complete", false, "Anything about this period: the head is from before it, "+s.head.Time.Format(scope.TimeFormat)+".")
		return nil
	}
	text := fmt.Sprintf("The record has exactly these %d entries of the period, up to %s.", r.Entries, until.UTC().Format(scope.TimeFormat))
	if f.To != nil && s.head.Time.Before(f.To.Time) {
		text += " The rest of the period is after the head: it is not proven."
	}
	r.claim("complete", true, text)
	return nil
}
