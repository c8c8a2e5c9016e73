package source

import (
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"sync"

	"github.com/oschwald/maxminddb-golang/v2"

	"inkan/scope"
)

// maxMMDB bounds an MMDB file, in bytes: it is held in memory.
const maxMMDB = 512 << 20

// File is region data in a file. When the file changes it is read again; while
// it cannot be read nothing is known of any address. Replace it by renaming another
// over it, so that it is never read half-written. It is safe for concurrent use.
type File struct {
	path string

	mu   sync.Mutex
	info os.FileInfo // of what was read last
	data Regions
	err  error // why there are no data
}

// Open reads region data: a geofeed if the name ends in .csv, an MMDB database
// of countries or cities if it ends in .mmdb.
func Open(path string) (*File, error) {
	f := &File{path: path}
	if _, err := f.current(); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return f, nil
}

// Lookup implements [Regions].
func (f *File) Lookup(a netip.Addr) ([]string, error) {
	data, err := f.current()
	if err != nil {
		return nil, err
	}
	return data.Lookup(a)
}

// current returns the data, read again if the file is another one by now.
func (f *File) current() (Regions, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	info, err := os.Stat(f.path)
	if err != nil {
		f.info, f.data = nil, nil
		return nil, fmt.Errorf("the file cannot be read: %w", cause(err))
	}
	if f.info != nil && os.SameFile(info, f.info) && info.ModTime().Equal(f.info.ModTime()) && info.Size() == f.info.Size() {
		return f.data, f.err
	}
	f.info = info
	f.data, f.err = read(f.path)
	return f.data, f.err
}

// cause leaves the path out: what is said may go to who asks.
func cause(err error) error {
	if p, ok := err.(*os.PathError); ok {
		return p.Err
	}
	return err
}

func read(path string) (Regions, error) {
	limit := int64(maxGeofeed)
	kind := filepath.Ext(path)
	switch kind {
	case ".csv":
	case ".mmdb":
		limit = maxMMDB
	default:
		return nil, fmt.Errorf("region data: a name that ends in .csv (a geofeed) or .mmdb is expected")
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, cause(err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, cause(err)
	}
	if int64(len(b)) > limit {
		return nil, fmt.Errorf("region data: more than %d bytes", limit)
	}
	if kind == ".csv" {
		return ParseGeofeed(b)
	}
	r, err := maxminddb.OpenBytes(b)
	if err != nil {
		return nil, fmt.Errorf("MMDB: %w", err)
	}
	return mmdb{r}, nil
}

// mmdb is a database of countries or cities.
type mmdb struct{ r *maxminddb.Reader }

// Lookup implements [Regions]. It is the place that counts, and not where the
// network is registered.
func (m mmdb) Lookup(a netip.Addr) ([]string, error) {
	var record struct {
		Country struct {
			Code string `maxminddb:"iso_code"`
		} `maxminddb:"country"`
		Subdivisions []struct {
			Code string `maxminddb:"iso_code"`
		} `maxminddb:"subdivisions"`
	}
	if err := m.r.Lookup(a.Unmap()).Decode(&record); err != nil {
		return nil, fmt.Errorf("MMDB: %w", err)
	}
	if !scope.ValidRegion(record.Country.Code) {
		return nil, nil
	}
	out := []string{record.Country.Code}
	for _, s := range record.Subdivisions {
		if r := record.Country.Code + "-" + s.Code; scope.ValidRegion(r) {
			out = append(out, r)
		}
	}
	return out, nil
}
